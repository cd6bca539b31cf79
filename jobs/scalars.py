"""Events as numbers with a name and a step, for every reader that draws curves: all of them show the same names."""

from __future__ import annotations

from typing import NamedTuple

from schemas import events
from schemas.events import Event


class Point(NamedTuple):
    """One number of a stage. `step` is training's own, or counts the units that are committed."""

    stage: str
    name: str
    step: int
    value: float


class Scalars:
    """Knows of each stage what its events add up to. A run's events go in from its beginning, in their order."""

    def __init__(self) -> None:
        self._step: dict[str, int] = {}
        self._store: dict[str, tuple[int, int, int]] = {}

    def __call__(self, event: Event) -> list[Point]:
        """What an event says in numbers."""
        stage, values = event.stage, dict[str, float]()
        if isinstance(event, events.StageStarted):
            # Units that were committed earlier: the curve of a resumed stage goes on where it ended.
            self._step[stage] = event.done
        elif isinstance(event, events.Progress):
            self._step[stage], values = event.step, event.scalars
        elif isinstance(event, events.UnitCommitted):
            self._step[stage] = self._step.get(stage, 0) + 1
            values = {
                "rows_per_second": event.rows / max(event.seconds, 1e-9),
                "unit_seconds": event.seconds,
                "peak_memory_bytes": event.peak_memory,
            }
        elif isinstance(event, events.QueueChanged):
            values = {"units_waiting": event.waiting, "units_running": event.running}
        elif isinstance(event, events.StoreUsed):
            read, written, retries = self._store.get(stage, (0, 0, 0))
            total = (read + event.read_bytes, written + event.written_bytes, retries + event.retries)
            self._store[stage] = total
            values = dict(zip(("store_read_bytes", "store_written_bytes", "store_retries"), total, strict=True))
        return [Point(stage, name, self._step.get(stage, 0), float(value)) for name, value in values.items()]


class StoreRates:
    """Bytes a second from and to the store, of late, and requests repeated so far, of one stage.

    Args:
        began: When the stage did, in seconds since 1970.
    """

    def __init__(self, began: float) -> None:
        self._told = began
        self.read = self.written = 0.0
        self.retries = 0

    def take(self, when: float, event: events.StoreUsed) -> None:
        """What was moved between the event before and this one."""
        span = max(when - self._told, 1e-3)
        self._told = when
        self.read, self.written = event.read_bytes / span, event.written_bytes / span
        self.retries += event.retries
