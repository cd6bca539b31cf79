"""What a run would do, stage by stage, and whether it can: computed before anything is written."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from cluster.storage.objects import free_bytes
from jobs.fingerprint import differences, fingerprint, spec
from jobs.fitting import nearest
from jobs.log import TrainingLog
from jobs.mesh import largest
from jobs.passes import companions, joint
from jobs.room import Room, needed, overhead
from jobs.state import StageFolder
from jobs.workspace import Workspace, label
from pipeline.stage import Committed, Estimate, Params, Sources, Stage
from pipeline.stages import STAGES, stages_of
from schemas import steps
from schemas.errors import ManifestError, StorageError
from schemas.manifest import Dictionary, Manifest
from schemas.quantities import size

# Of those that run together, in a note.
NAMED = 3


class Action(StrEnum):
    """What happens to a stage."""

    RUN = "RUN"
    RESUME = "RESUME"
    SKIP = "SKIP"


@dataclass(frozen=True, slots=True)
class Planned:
    """One stage of a plan. `folder` is None while an input is not committed, because its digest is part of the name.

    `rows_done` are those that earlier runs have committed. `led_by` is the label of the first of those that run in one
    pass with it.
    """

    stage: Stage
    dictionary: Dictionary | None
    params: Params
    action: Action
    reason: str
    estimate: Estimate
    folder: StageFolder | None
    rows_done: int = 0
    led_by: str = ""

    @property
    def label(self) -> str:
        """The stage's name in messages."""
        return label(self.stage, self.dictionary)


@dataclass(frozen=True, slots=True)
class Plan:
    """All stages of a manifest, in order, and the sources as exactly as they are known."""

    stages: tuple[Planned, ...]
    sources: Sources

    @property
    def open(self) -> list[Planned]:
        """Those that are to be run."""
        return [planned for planned in self.stages if planned.action is not Action.SKIP]


def instances(manifest: Manifest) -> list[tuple[Stage, Dictionary | None]]:
    """Every stage to run: the shared ones once, the others for each dictionary in turn."""
    stages = {stage.step: stage for stage in stages_of(manifest)}
    return [(stages[step], dictionary) for step, dictionary in steps.instances(manifest)]


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
        action, reason, rows = _progress(folder, estimate)
        if action is Action.RUN:
            reason = _changed(workspace, stage, dictionary, params, digests) or "not run yet"
        planned.append(Planned(stage, dictionary, params, action, reason, estimate, folder, rows))
    return Plan(tuple(_together(planned, manifest, sources)), sources)


def _together(planned: list[Planned], manifest: Manifest, sources: Sources) -> list[Planned]:
    """The stages as they run: what runs together needs the memory of all of it, and says so."""
    todo = {each.label: each for each in planned if each.action is not Action.SKIP}
    groups: dict[str, list[Planned]] = {}
    for first in planned:
        if todo.pop(first.label, None) is None:
            continue
        is_open = functools.partial(_is_open, todo, first.stage)
        others = companions(first.stage, first.dictionary, manifest, sources, is_open)
        group = [first, *(todo.pop(label(first.stage, other)) for other in others)]
        groups |= {each.label: group for each in group}
    return [_beside(each, groups.get(each.label, [])) for each in planned]


def _is_open(todo: Mapping[str, Planned], stage: Stage, dictionary: Dictionary) -> bool:
    return label(stage, dictionary) in todo


def _beside(one: Planned, group: list[Planned]) -> Planned:
    """A stage with the memory of the group that it runs in."""
    others = [each for each in group if each is not one]
    if not others:
        return one
    estimate = functools.reduce(joint, (each.estimate for each in others), one.estimate)
    more = f" and {len(others) - NAMED} more" if len(others) > NAMED else ""
    note = f"{estimate.note}, in one pass with {', '.join(each.label for each in others[:NAMED])}{more}"
    return replace(one, estimate=replace(estimate, note=note), led_by=group[0].label)


def _progress(folder: StageFolder, estimate: Estimate) -> tuple[Action, str, int]:
    checkpoint = TrainingLog(folder.path).latest()
    if checkpoint is not None:
        return Action.RESUME, f"from step {checkpoint.step}", int(checkpoint.facts["tokens"])
    units = len(folder.units())
    if units:
        return Action.RESUME, f"{units} of {estimate.units} units", estimate.rows * units // max(1, estimate.units)
    return Action.RUN, "", 0


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
        ManifestError: the memory, a GPU or the disk is too small, or GPUs are too few; with the numbers.
        StorageError: the disk has become too small since.
    """
    room = Room.of(manifest.compute)
    _refuse_ranks(plan, manifest, room)
    _refuse_memory(plan, manifest, room)
    free = free_bytes(workspace.root)
    stored = sum(planned.estimate.stored_bytes for planned in plan.open)
    if free is not None and stored > free:
        what = f"the run stores {size(stored)} below {workspace.root}, free there are {size(free)}"
        if started:
            raise StorageError(what, "make room, then resume: everything committed is kept")
        raise ManifestError(what, "lower harvest.tokens, choose another root, or make room")


def _refuse_memory(plan: Plan, manifest: Manifest, room: Room) -> None:
    for planned in plan.open:
        estimate, beside = planned.estimate, overhead(manifest)
        if room.holds(estimate, manifest):
            continue
        if not room.holds_card(estimate):
            assert room.card is not None
            each = f"{estimate.gpus:g} x {size(room.card)}" if estimate.gpus != 1 else size(room.card)
            what = f"{planned.label} x {estimate.workers} needs {size(estimate.card)} on a GPU each, there are {each}"
        else:
            assert room.memory is not None
            what = (
                f"{planned.label} needs {size(needed(estimate, manifest))} of memory ({estimate.workers} x "
                f"{size(estimate.memory)} and {size(beside)} for the driver and Ray), there are {size(room.memory)}"
            )
        raise ManifestError(
            what,
            nearest(
                planned.stage,
                planned.dictionary,
                manifest,
                plan.sources,
                lambda other, of: room.seats(of) and room.holds(other, of),
            ),
        )


def _refuse_ranks(plan: Plan, manifest: Manifest, room: Room) -> None:
    mesh = manifest.compute.sharding
    if room.seats(manifest) or not any(each.stage.name == "train" for each in plan.open):
        return
    assert room.ranks is not None
    fits = largest(manifest, plan.sources, room.ranks)
    raise ManifestError(
        f"compute.sharding {mesh.features} x {mesh.data} has {mesh.ranks} ranks with a GPU each, this machine has "
        f"{room.ranks}",
        f"set compute.sharding.features to {fits.features} and data to {fits.data}, or sharding to auto",
    )
