"""What a root says of itself: counts come from the records, the rest from the newest run's events."""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import dataclass, field
from typing import Any

from cluster.storage.objects import names, read_bytes, read_json
from cluster.storage.path import StoragePath
from jobs.log import TrainingLog
from jobs.state import StageFolder
from jobs.workspace import PROCESS
from schemas.errors import ManifestError
from schemas.layouts import COMMITTED, RUNS


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
    seen = _events(run)
    alive = _alive(run)
    last = max((event["time"] for event in seen), default=None)
    stages = tuple(_stage(root, name, seen, alive) for name in labels)
    return Status(run.name, alive, None if last is None else max(0.0, time.time() - last), stages)


def _events(run: StoragePath) -> list[dict[str, Any]]:
    found = []
    for segment in names(run / "events"):
        found += [json.loads(line) for line in read_bytes(run / "events" / segment).splitlines() if line]
    return found


def _alive(run: StoragePath) -> bool | None:
    """Whether the run's driver lives; None if that cannot be told from here."""
    try:
        process = read_json(run / PROCESS)
    except FileNotFoundError:
        return None
    if process["host"] != socket.gethostname():
        return None
    try:
        os.kill(process["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _stage(root: StoragePath, name: str, seen: list[dict[str, Any]], alive: bool | None) -> StageStatus:
    ours = [event for event in seen if event["stage"] == name]
    folders = [event["folder"] for event in ours if "folder" in event]
    if not folders:
        return StageStatus(name, "waiting", 0, 0)
    # Events name the folder where it was then; a root may be moved.
    stage, _, dictionary = name.partition("/")
    base = root / "dictionaries" / dictionary / stage if dictionary else root / stage
    path = base / StoragePath.parse(folders[-1]).name
    units = len(StageFolder(path, name, "").units())
    total = max((event["total"] for event in ours if event["event"] == "StageStarted"), default=units)
    scalars: dict[str, float] = next((event["scalars"] for event in reversed(ours) if event["event"] == "Progress"), {})
    if COMMITTED in names(path):
        return StageStatus(name, "committed", max(units, total), max(units, total), "", scalars)
    state = "stopped" if alive is False else "running"
    checkpoint = TrainingLog(path).latest()
    progress = [event for event in ours if event["event"] == "Progress"]
    if progress or checkpoint:
        tokens = progress[-1] if progress else {"done": 0, "total": 0}
        detail = f"last checkpoint at step {checkpoint.step}" if checkpoint else "no checkpoint yet"
        return StageStatus(name, state, tokens["done"], tokens["total"], detail, scalars)
    return StageStatus(name, state, units, total)
