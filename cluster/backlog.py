"""How much work waits: told by the pools as it changes, though not at every change."""

from __future__ import annotations

import time
from collections.abc import Callable

from schemas.events import Event, QueueChanged

SHORTEST, LONGEST = 1.0, 60.0
# Of the time that it has been going on.
SHARE = 0.02


class Occasion:
    """When to tell of what changes all the time: every second at first, after an hour once a minute.

    So the log of a week is not much longer than that of a day.
    """

    def __init__(self) -> None:
        self._began = self._told = time.monotonic()

    def due(self, forced: bool = False) -> bool:
        """Whether to tell now; a forced one counts as told, too."""
        now = time.monotonic()
        wait = min(LONGEST, max(SHORTEST, SHARE * (now - self._began)))
        if not forced and now - self._told < wait:
            return False
        self._told = now
        return True


class Backlog:
    """The units of one stage that wait for a worker, and those that workers have.

    Args:
        stage: Label for events.
        emit: Who is told.
    """

    def __init__(self, stage: str, emit: Callable[[Event], None]) -> None:
        self._stage, self._emit, self._occasion = stage, emit, Occasion()
        self._told = (0, 0)

    def at(self, waiting: int, running: int) -> None:
        """It is so now. The beginning and the end are told at once."""
        state = (waiting, running)
        if state != self._told and self._occasion.due(forced=(0, 0) in (state, self._told)):
            self._told = state
            self._emit(QueueChanged(self._stage, waiting, running))
