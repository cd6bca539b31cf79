"""What a root says of itself: counts come from the records, the rest from the newest run's events."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from pydantic import ValidationError

from cluster.storage.objects import names, read_json
from cluster.storage.path import StoragePath
from jobs import lease
from jobs.log import TrainingLog
from jobs.state import StageFolder
from jobs.workspace import PROCESS, events_of
from schemas.errors import IntegrityError, ManifestError
from schemas.events import Event, Progress, StageCommitted, StageStarted
from schemas.layouts import COMMITTED, RUNS
from schemas.records import Owner


@dataclass(frozen=True, slots=True)
class StageStatus:
    """One stage: `committed`, `running` or `stopped` with `done` of `total`, or `waiting`."""

    stage: str
    state: str
    done: int
    total: int
    detail: str = ""
    scalars: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Status:
    """A root's newest run."""

    run: str
    alive: bool | None
    seconds_since_event: float | None
    stages: tuple[StageStatus, ...]


def read(root: StoragePath, labels: list[str]) -> Status:
    """Look at the newest run.

    Args:
        root: The manifest's root.
        labels: The manifest's stages.

    Raises:
        ManifestError: nothing was ever run there.
    """
    runs = names(root / RUNS)
    if not runs:
        raise ManifestError(f"root {root} has no run", "start one with `kilobasis run`")
    run = root / RUNS / runs[-1]
    seen = list(events_of(run))
    alive = _alive(run)
    last = max((when for when, _ in seen), default=None)
    stages = tuple(_stage(root, name, [event for _, event in seen if event.stage == name], alive) for name in labels)
    return Status(run.name, alive, None if last is None else max(0.0, time.time() - last), stages)


def _alive(run: StoragePath) -> bool | None:
    """Whether the run's driver lives; None if that cannot be told from here."""
    try:
        state = lease.state(Owner.model_validate(read_json(run / PROCESS)))
    except (FileNotFoundError, IntegrityError, ValidationError):
        return None
    return None if state == "unknown" else state != "dead"


def _stage(root: StoragePath, name: str, ours: list[Event], alive: bool | None) -> StageStatus:
    folders = [event.folder.rstrip("/") for event in ours if isinstance(event, StageStarted | StageCommitted)]
    # Events name the folder where it was then; a root may be moved.
    folder = folders[-1].rpartition("/")[2] if folders else ""
    if folder in ("", ".", ".."):
        return StageStatus(name, "waiting", 0, 0)
    stage, _, dictionary = name.partition("/")
    base = root / "dictionaries" / dictionary / stage if dictionary else root / stage
    path = base / folder
    units = len(StageFolder(path, name, "").units())
    total = max((event.total for event in ours if isinstance(event, StageStarted)), default=units)
    progress = [event for event in ours if isinstance(event, Progress)]
    scalars = progress[-1].scalars if progress else {}
    if COMMITTED in names(path):
        return StageStatus(name, "committed", max(units, total), max(units, total), "", scalars)
    state = "stopped" if alive is False else "running"
    checkpoint = TrainingLog(path).latest()
    if progress or checkpoint:
        done, total = (progress[-1].done, progress[-1].total) if progress else (0, 0)
        detail = f"last checkpoint at step {checkpoint.step}" if checkpoint else "no checkpoint yet"
        return StageStatus(name, state, done, total, detail, scalars)
    return StageStatus(name, state, units, total)
