"""What a run tells the world while it goes on. Everything that shows progress is a reader of these."""

from __future__ import annotations

from dataclasses import dataclass, field


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
class CheckpointCommitted:
    """Training can resume from here."""

    stage: str
    step: int
    seconds: float


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A worker died and is being replaced."""

    stage: str
    reason: str
    attempt: int


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


Event = StageStarted | UnitCommitted | Progress | CheckpointCommitted | WorkerLost | StageCommitted | Note
