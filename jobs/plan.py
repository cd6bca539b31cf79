"""What a run would do, stage by stage, and whether it can: computed before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from cluster.devices import machine_memory
from cluster.storage.objects import free_bytes
from jobs.fingerprint import differences, fingerprint, spec
from jobs.fitting import nearest
from jobs.log import TrainingLog
from jobs.state import StageFolder
from jobs.workspace import Workspace, label
from pipeline.stage import Committed, Estimate, Params, Sources, Stage
from pipeline.stages import STAGES
from schemas.errors import ManifestError, StorageError
from schemas.manifest import Dictionary, Manifest

# Measured: the driver with torch, transformers and ray imported, and the processes of a local Ray.
DRIVER_MEMORY = 900 * 2**20
RAY_MEMORY = 700 * 2**20


class Action(StrEnum):
    """What happens to a stage."""

    RUN = "RUN"
    RESUME = "RESUME"
    SKIP = "SKIP"


@dataclass(frozen=True, slots=True)
class Planned:
    """One stage of a plan. `folder` is None while an input is not committed, because its digest is part of the name."""

    stage: Stage
    dictionary: Dictionary | None
    params: Params
    action: Action
    reason: str
    estimate: Estimate
    folder: StageFolder | None

    @property
    def label(self) -> str:
        """The stage's name in messages."""
        return label(self.stage, self.dictionary)


@dataclass(frozen=True, slots=True)
class Plan:
    """All stages of a manifest, in order, and the sources as exactly as they are known."""

    stages: tuple[Planned, ...]
    sources: Sources


def instances(manifest: Manifest) -> list[tuple[Stage, Dictionary | None]]:
    """Every stage to run: the shared ones once, the others for each dictionary in turn."""
    shared: list[tuple[Stage, Dictionary | None]] = [(stage, None) for stage in STAGES if not stage.per_dictionary]
    return shared + [
        (stage, dictionary) for dictionary in manifest.dictionaries for stage in STAGES if stage.per_dictionary
    ]


def inputs_of(
    stage: Stage, dictionary: Dictionary | None, done: Mapping[str, Committed]
) -> dict[str, Committed] | None:
    """The stage's inputs, or None while one of them is not committed."""
    found = {}
    for need in stage.needs:
        (upstream,) = [other for other in STAGES if other.name == need]
        committed = done.get(label(upstream, dictionary if upstream.per_dictionary else None))
        if committed is None:
            return None
        found[need] = committed
    return found


def refine(sources: Sources, tokenized: Committed) -> Sources:
    """The sources with the true number of rows instead of an estimate."""
    corpus = replace(
        sources.corpus,
        train_rows=tokenized.facts["train_rows"],
        heldout_rows=tokenized.facts["heldout_rows"],
        exact=True,
    )
    return replace(sources, corpus=corpus)


def make(manifest: Manifest, workspace: Workspace, sources: Sources) -> Plan:
    """Plan every stage.

    Raises:
        ManifestError: a stage cannot work as it stands.
    """
    done: dict[str, Committed] = {}
    planned = []
    for stage, dictionary in instances(manifest):
        stage.check(manifest, dictionary, sources)
        params = stage.params(manifest, dictionary, sources)
        estimate = stage.estimate(manifest, dictionary, sources)
        inputs = inputs_of(stage, dictionary, done)
        name = label(stage, dictionary)
        if inputs is None:
            waits = ", ".join(stage.needs)
            reason = _changed(workspace, stage, dictionary, params, None) or f"after {waits}"
            planned.append(Planned(stage, dictionary, params, Action.RUN, reason, estimate, None))
            continue
        digests = {need: committed.record.digest for need, committed in inputs.items()}
        folder = workspace.folder(stage, dictionary, fingerprint(spec(stage, params, digests)))
        committed = folder.committed()
        if committed is not None:
            done[name] = committed
            planned.append(
                Planned(
                    stage,
                    dictionary,
                    params,
                    Action.SKIP,
                    f"committed, {committed.record.digest[:12]}",
                    estimate,
                    folder,
                )
            )
            if stage.name == "tokenize":
                sources = refine(sources, committed)
            continue
        action, reason = _progress(folder, estimate)
        if action is Action.RUN:
            reason = _changed(workspace, stage, dictionary, params, digests) or "not run yet"
        planned.append(Planned(stage, dictionary, params, action, reason, estimate, folder))
    return Plan(tuple(planned), sources)


def _progress(folder: StageFolder, estimate: Estimate) -> tuple[Action, str]:
    checkpoint = TrainingLog(folder.path).latest()
    if checkpoint is not None:
        return Action.RESUME, f"from step {checkpoint.step}"
    units = len(folder.units())
    if units:
        return Action.RESUME, f"{units} of {estimate.units} units"
    return Action.RUN, ""


def _changed(
    workspace: Workspace,
    stage: Stage,
    dictionary: Dictionary | None,
    params: Params,
    digests: Mapping[str, str] | None,
) -> str:
    """The fields in which the nearest earlier folder of this stage differs; empty if there is none."""
    ours = spec(stage, params, digests or {})
    candidates = []
    for earlier in workspace.specs(stage, dictionary):
        if digests is None:
            earlier = {**earlier, "inputs": {}}
        changes = list(differences(earlier, ours))
        if changes:
            candidates.append(changes)
    if not candidates:
        return ""
    nearest = min(candidates, key=len)
    return "changed " + "; ".join(change.removeprefix("params.") for change in nearest[:3])


def refuse(plan: Plan, manifest: Manifest, workspace: Workspace, started: bool = False) -> None:
    """Refuse what cannot fit.

    Args:
        plan: What is to be done.
        manifest: What it is for.
        workspace: Where.
        started: Something was written already, and the disk held enough when it was.

    Raises:
        ManifestError: the memory or the disk is too small; with the numbers.
        StorageError: the disk has become too small since.
    """
    todo = [planned for planned in plan.stages if planned.action is not Action.SKIP]
    limit = manifest.compute.memory or machine_memory()
    for planned in todo:
        estimate, overhead = planned.estimate, _overhead(manifest)
        needed = _needed(estimate, manifest)
        if needed > limit:
            raise ManifestError(
                f"{planned.label} needs {size(needed)} of memory ({estimate.workers} x {size(estimate.memory)} and "
                f"{size(overhead)} for the driver and Ray), there are {size(limit)}",
                nearest(
                    planned.stage,
                    planned.dictionary,
                    manifest,
                    plan.sources,
                    lambda other, of: _needed(other, of) <= limit,
                ),
            )
    free = free_bytes(workspace.root)
    stored = sum(planned.estimate.stored_bytes for planned in todo)
    if free is not None and stored > free:
        what = f"the run stores {size(stored)} below {workspace.root}, free there are {size(free)}"
        if started:
            raise StorageError(what, "make room, then resume: everything committed is kept")
        raise ManifestError(what, "lower harvest.tokens, choose another root, or make room")


def _overhead(manifest: Manifest) -> int:
    """Bytes that everything but the workers takes on this machine."""
    return (DRIVER_MEMORY + RAY_MEMORY) if manifest.compute.address is None and manifest.compute.pool == "ray" else 0


def _needed(estimate: Estimate, manifest: Manifest) -> int:
    """Bytes on one machine: here all workers are, on a cluster every one may have its own."""
    workers = estimate.workers if manifest.compute.address is None else 1
    return estimate.memory * workers + _overhead(manifest)


def size(count: float) -> str:
    """Bytes for people.

    >>> size(1536), size(3 * 2**30)
    ('1.5 KiB', '3.0 GiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError
