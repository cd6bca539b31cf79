"""What a run tells the world while it goes on. Everything that shows progress is a reader of these."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, get_args

from pydantic import TypeAdapter
from pydantic_core import from_json

# In the place of a stage's label, of what is about the whole run.
RUN = "run"


@dataclass(frozen=True, slots=True)
class StageStarted:
    """A stage begins in `folder`, with `done` of `total` units committed earlier."""

    stage: str
    done: int
    total: int
    folder: str


@dataclass(frozen=True, slots=True)
class UnitCommitted:
    """A unit was committed."""

    stage: str
    unit: str
    rows: int
    seconds: float
    peak_memory: int


@dataclass(frozen=True, slots=True)
class Progress:
    """`done` of `total` (training: tokens) with the scalars of the moment."""

    stage: str
    step: int
    done: int
    total: int
    scalars: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class QueueChanged:
    """Units that wait for a worker, and units that workers have."""

    stage: str
    waiting: int
    running: int


@dataclass(frozen=True, slots=True)
class StoreUsed:
    """What the stage's processes have done since this was last told: bytes from and to the store, requests repeated."""

    stage: str
    read_bytes: int
    written_bytes: int
    retries: int


@dataclass(frozen=True, slots=True)
class CheckpointCommitted:
    """Training can resume from here."""

    stage: str
    step: int
    seconds: float


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A worker or a rank is gone, through no fault of its work, and is being replaced.

    `attempt` counts those that the stage has lost; `doing` is the unit or the rank that the worker had.
    """

    stage: str
    reason: str
    attempt: int
    doing: str = ""


@dataclass(frozen=True, slots=True)
class UnitFailed:
    """A unit raised by itself, in attempt `attempt` of `attempts`."""

    stage: str
    unit: str
    reason: str
    attempt: int
    attempts: int
    traceback: str


@dataclass(frozen=True, slots=True)
class UnitQuarantined:
    """A unit is not tried again. The others go on; the stage will fail."""

    stage: str
    unit: str
    reason: str


@dataclass(frozen=True, slots=True)
class StageCommitted:
    """A stage was committed; `skipped` if an earlier run had done it."""

    stage: str
    seconds: float
    digest: str
    folder: str
    skipped: bool = False


@dataclass(frozen=True, slots=True)
class Note:
    """A sentence worth keeping."""

    stage: str
    text: str


@dataclass(frozen=True, slots=True)
class RunEnded:
    """The last word of a run, if it was left the time for one. `stage` is `RUN`.

    `exit_code` is what the command ended with (see `schemas.errors`), `reason` a line; empty where all is committed.
    """

    stage: str
    exit_code: int
    reason: str


Event = (
    StageStarted
    | UnitCommitted
    | UnitFailed
    | UnitQuarantined
    | Progress
    | QueueChanged
    | StoreUsed
    | CheckpointCommitted
    | WorkerLost
    | StageCommitted
    | Note
    | RunEnded
)

# The year 9999. Nothing that has a clock to show can show more.
LATEST = 253_370_764_800.0
LARGEST = 1e300
_NUMBERS = (int, float)

_KINDS = {kind.__name__: TypeAdapter(kind) for kind in get_args(Event)}


def line(event: Event, when: float) -> str:
    """An event as a line of a log; `when` in seconds since 1970."""
    return json.dumps({"time": round(when, 3), "event": type(event).__name__, **dataclasses.asdict(event)})


def parse_lines(body: bytes) -> list[tuple[float, Event]]:
    """The events of a log, with their times. A log is for people: a line that is damaged says nothing."""
    found = []
    for text in body.split(b"\n"):
        try:
            content = from_json(text)
            when, kind = float(content.pop("time")), _KINDS[content.pop("event")]
            event = kind.validate_python(content)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
        if 0 <= when < LATEST and _is_finite(content):
            found.append((when, event))
    return found


def _is_finite(content: dict[str, Any]) -> bool:
    """Whether all numbers of an event are some. An int may be one that no float can hold, too."""
    # Logs are long, and most of an event is no number.
    for values in (content, content.get("scalars", {})):
        for value in values.values():
            if type(value) in _NUMBERS and not -LARGEST < value < LARGEST:
                return False
    return True
