"""What a root says of itself: the records tell how far each stage is, events only add the scalars of the moment."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from pydantic import ValidationError

from cluster.storage.listing import listing
from cluster.storage.objects import names, read_checked, read_json
from cluster.storage.path import StoragePath
from jobs import lease
from jobs.event_log import ending_of, events_of
from jobs.log import TrainingLog
from jobs.state import StageFolder
from jobs.workspace import PROCESS, Workspace, label, manifest_of
from schemas.compute import Compute
from schemas.errors import IntegrityError, ManifestError
from schemas.events import Event, Progress, RunEnded, StageCommitted, StageStarted
from schemas.layouts import BEATS, COMMITTED, LOG, RUNS, SPEC, beat_key
from schemas.manifest import Dictionary
from schemas.records import LeaseRecord, Owner, StageRecord, parse_record
from schemas.steps import Step, instances

# Runs whose events are looked through for the folder of a stage; older ones are passed over.
RECENT_RUNS = 20


@dataclass(frozen=True, slots=True)
class StageStatus:
    """One stage: `committed`, `running` or `stopped` with `done` of `total`, `waiting`, or `damaged`."""

    stage: str
    state: str
    done: int
    total: int
    detail: str = ""
    scalars: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Status:
    """A root's newest run, and its stages. `ended` is its last word, None where it has none (yet).

    `seconds_since_sign` counts from its last sign of life: an event, or a beat of a stage that it leads.
    """

    run: str
    alive: bool | None
    ended: RunEnded | None
    seconds_since_sign: float | None
    stages: tuple[StageStatus, ...]


def read(workspace: Workspace) -> Status:
    """Look at the stages of a manifest in its root.

    Args:
        workspace: The manifest's.

    Raises:
        ManifestError: nothing was ever run there.
    """
    root = workspace.root
    runs = workspace.runs()
    if not runs:
        raise ManifestError(f"root {root} has no run", "start one with `kilobasis run`")
    newest = root / RUNS / runs[-1]
    ended = ending_of(newest)
    # A long run's are many.
    events = functools.cache(lambda run: list(events_of(root / RUNS / run)))
    last = heard(root, events(newest.name))
    told = _told(workspace, runs, events)
    digests: dict[str, str] = {}
    stages = []
    for stage, dictionary in instances(workspace.manifest):
        name = label(stage, dictionary)
        path = _folder(workspace, stage, dictionary, told.get(name, []), digests)
        if path is None:
            stages.append(StageStatus(name, "waiting", 0, 0))
            continue
        found, record = _stage(path, name, told.get(name, []))
        stages.append(found)
        if record is not None:
            digests[name] = record.digest
    since = None if last is None else max(0.0, time.time() - last)
    return Status(newest.name, alive(newest), ended, since, tuple(stages))


def alive(run: StoragePath) -> bool | None:
    """Whether the run is not over: its driver lives, and has not said its last word. None if nobody can tell here."""
    try:
        state = lease.state(Owner.model_validate(read_json(run / PROCESS)))
    except (FileNotFoundError, IntegrityError, ValidationError):
        state = "unknown"
    if state == "dead" or ending_of(run) is not None:
        return False
    return None if state == "unknown" else True


def fate(alive_: bool | None, ended: RunEnded | None) -> str:
    """What is known of a run's end, in a few words."""
    if ended is not None:
        return f"ended with exit code {ended.exit_code}" if ended.exit_code else "finished"
    return {True: "running", False: "not running, without a last word", None: "on another machine"}[alive_]


def heard(root: StoragePath, told: Iterable[tuple[float, Event]]) -> float | None:
    """When the newest run of a root gave its last sign of life, in seconds since 1970; None where it gave none.

    Args:
        root: Whose.
        told: The run's events. A long unit tells nothing; the beats of the stage that it is of go on meanwhile.
    """
    signs, open_ = list[float](), dict[str, StageStarted]()
    for when, event in told:
        signs.append(when)
        if isinstance(event, StageStarted):
            open_[event.stage] = event
        elif isinstance(event, StageCommitted):
            open_.pop(event.stage, None)
    return max([*signs, *beats(root, open_.values())], default=None)


def beats(root: StoragePath, leads: Iterable[StageStarted]) -> list[float]:
    """When the stages that a run leads were last shown to be led.

    Args:
        root: Whose.
        leads: What the run told when it began them.
    """
    found = []
    for event in leads:
        stage, _, dictionary = event.stage.partition("/")
        # Events are what anybody may have written: a name that climbs names nothing.
        with suppress(ValueError):
            base = root / "dictionaries" / dictionary / stage if dictionary else root / stage
            found += [each.modified for each in listing(base / _named(event) / BEATS).values() if each.modified]
    return found


def _told(
    workspace: Workspace, runs: list[str], events: Callable[[str], list[tuple[float, Event]]]
) -> dict[str, list[Event]]:
    """What the newest run that worked on a stage told of it, for each stage; only runs of this manifest count."""
    ours = workspace.manifest.identity()
    wanted = {label(stage, dictionary) for stage, dictionary in instances(workspace.manifest)}
    found: dict[str, list[Event]] = {}
    for run in reversed(runs[-RECENT_RUNS:]):
        manifest = manifest_of(workspace.root / RUNS / run)
        if manifest is None or {key: manifest.get(key) for key in ours} != ours:
            continue
        by_stage: dict[str, list[Event]] = {}
        for _, event in events(run):
            by_stage.setdefault(event.stage, []).append(event)
        for name in wanted - set(found):
            of_stage = by_stage.get(name, [])
            if any(_named(event) for event in of_stage):
                found[name] = of_stage
        if wanted == set(found):
            break
    return found


def _named(event: Event) -> str:
    """The name of the folder that an event tells of. Its place is where it was then: a root may be moved."""
    return event.folder.rstrip("/").rpartition("/")[2] if isinstance(event, StageStarted | StageCommitted) else ""


def _folder(
    workspace: Workspace,
    stage: Step,
    dictionary: Dictionary | None,
    told: list[Event],
    digests: Mapping[str, str],
) -> StoragePath | None:
    """Which folder of a stage the manifest is about; None where there is none.

    A stage has a folder for each fingerprint. The one that a run of this manifest told of is the one. Runs that died
    before they told anything leave folders all the same: one that was made from what is committed here, and of
    several the one that a run led last.
    """
    base = workspace.stage_root(stage, dictionary)
    there = names(base)
    for event in reversed(told):
        if _named(event) in there:
            return base / _named(event)
    needed = {}
    for need in stage.needs:
        digest = digests.get(need) or digests.get(f"{need}/{dictionary.name}" if dictionary else "")
        if digest is None:
            return None
        needed[need] = digest
    fitting = [base / name for name in there if _inputs(base / name) == needed]
    return fitting[0] if len(fitting) == 1 else max(fitting, key=_led, default=None)


def _inputs(path: StoragePath) -> object:
    """The digests of what a folder's stage is made from."""
    try:
        found = read_json(path / SPEC)
    except (FileNotFoundError, IntegrityError):
        return None
    return found.get("inputs") if isinstance(found, dict) else None


def _led(path: StoragePath) -> float:
    """When a run last led a folder's stage, by the store's clock."""
    shown = {**listing(path / LOG), **listing(path / BEATS)}
    return max((each.modified or 0.0 for each in shown.values()), default=0.0)


def _record(path: StoragePath) -> StageRecord:
    where = path / COMMITTED
    return read_checked(where, lambda body: parse_record(StageRecord, body, str(where)), listed=True)


def _stage(path: StoragePath, name: str, told: list[Event]) -> tuple[StageStatus, StageRecord | None]:
    """How far a stage is, and its record if it is committed."""
    total = max((event.total for event in told if isinstance(event, StageStarted)), default=0)
    progress = [event for event in told if isinstance(event, Progress)]
    scalars = progress[-1].scalars if progress else {}
    try:
        if COMMITTED in names(path):
            record = _record(path)
            done = max(len(record.units), total)
            return StageStatus(name, "committed", done, done, "", scalars), record
        log = TrainingLog(path)
        checkpoint = log.latest()
    except (IntegrityError, FileNotFoundError) as error:
        return StageStatus(name, "damaged", 0, total, f"look with `kilobasis verify`: {error}", scalars), None
    units = StageFolder(path, name, "").done(total)
    state, detail = _led_by(path, log.lease)
    if not (progress or checkpoint):
        state = "waiting" if log.lease is None and not units else state
        return StageStatus(name, state, units, total, detail, scalars), None
    done, total = (progress[-1].done, progress[-1].total) if progress else (0, 0)
    at = f"last checkpoint at step {checkpoint.step}" if checkpoint else "no checkpoint yet"
    return StageStatus(name, state, done, total, f"{at}, {detail}" if detail else at, scalars), None


def _led_by(path: StoragePath, holder: LeaseRecord | None) -> tuple[str, str]:
    """Whether a stage that is not committed is being run, and by whom if that is elsewhere."""
    beat = lease.read_beat(path, holder) if holder else None
    if holder is None or (beat and beat.released):
        return "stopped", ""
    of = lease.state(holder.owner)
    if of != "unknown":
        return ("running" if of == "alive" else "stopped"), ""
    who = f"{holder.owner.host}, process {holder.owner.pid}"
    shown = listing(path / BEATS).get(beat_key(holder.epoch, holder.nonce).removeprefix(f"{BEATS}/"))
    # Two clocks, which is good enough for people; a run that wants the lease waits by its own alone.
    silent = 0.0 if shown is None or shown.modified is None else time.time() - shown.modified
    if silent > max(Compute().lease_seconds, beat.seconds if beat else 0.0):
        return "stopped", f"no sign of life from {who} for {silent:.0f} s"
    return "running", f"led by {who}"
