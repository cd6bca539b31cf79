"""What is done about failures: how long to wait, how often to try again, and when to set a unit aside.

Two kinds are kept apart. A *system failure* (a node, a process or a connection is gone) says nothing about
the work, and is retried without end, ever more slowly. A unit that fails *by itself* is tried a few times and
then quarantined: the others go on, and the stage fails when they are done.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from cluster.storage import redaction
from schemas.errors import KilobasisError, StageFailedError
from schemas.events import Event, UnitFailed, UnitQuarantined

# How often a unit that raises is tried, unless the manifest says otherwise.
ATTEMPTS = 3
# Worker processes that may die in a row of one unit before it is taken for the murderer.
CRASHES = 5
# Quarantined in a row, and nothing succeeded in between: the fault is not in the units.
HOPELESS = 20
# Seconds that a unit may take, unless the manifest says otherwise: by then it hangs.
UNIT_SECONDS = 3600.0

SHORTEST, LONGEST = 0.2, 30.0


class Backoff:
    """Waits that double from 0.2 s to 30 s, and vary, so that not everybody comes back at once."""

    def __init__(self) -> None:
        self._failures = 0

    def wait(self) -> float:
        """Seconds to wait after one more failure."""
        ceiling = min(LONGEST, SHORTEST * 2.0 ** min(self._failures, 16))
        self._failures += 1
        return ceiling * random.uniform(0.5, 1.0)

    def reset(self) -> None:
        """Something succeeded."""
        self._failures = 0


class Reminder:
    """Says when it is time to tell of a wait: after `first` seconds of it, then after every `again` more."""

    def __init__(self, first: float, again: float) -> None:
        self._first, self._again = first, again
        self._next = first

    def due(self, waited: float) -> bool:
        """Whether to tell now, `waited` seconds into the wait. A shorter wait than before is a new one."""
        if waited < self._next - self._again:
            self._next = self._first
        if waited < self._next:
            return False
        self._next = waited + self._again
        return True


class Tries:
    """The units of one call of `map` that failed: which may be tried again, which are quarantined.

    Args:
        stage: Label for events and errors.
        total: Units of the call.
        attempts: How often a unit that raises is tried in all.
        emit: Who is told.
    """

    def __init__(self, stage: str, total: int, attempts: int, emit: Callable[[Event], None]) -> None:
        self._stage, self._total, self._attempts, self._emit = stage, total, attempts, emit
        self._raised: dict[str, int] = {}
        self._crashes: dict[str, int] = {}
        self._quarantined: dict[str, str] = {}
        self._first: BaseException | None = None
        self._done = self._fruitless = 0

    def done(self) -> None:
        """A unit was done."""
        self._done += 1
        self._fruitless = 0

    def raised(self, unit: str, error: BaseException, traceback: str) -> bool:
        """Count what a unit raised.

        Returns:
            Whether to try it again.

        Raises:
            KilobasisError: it was one. Those say what is wrong for certain; another try finds the same.
            StageFailedError: so many units failed one after the other that the rest is not tried.
        """
        if isinstance(error, KilobasisError):
            raise error
        self._crashes.pop(unit, None)
        count = self._raised[unit] = self._raised.get(unit, 0) + 1
        self._emit(UnitFailed(self._stage, unit, first_line(error), count, self._attempts, traceback))
        return count < self._attempts or self._quarantine(unit, f"{first_line(error)} ({count} attempts)", error)

    def crashed(self, unit: str, reason: str, error: BaseException) -> bool:
        """Count a worker process that died while it had this unit.

        Returns:
            Whether to try it again.

        Raises:
            StageFailedError: see `raised`.
        """
        count = self._crashes[unit] = self._crashes.get(unit, 0) + 1
        return count < CRASHES or self._quarantine(unit, f"{count} workers in a row died of it ({reason})", error)

    def _quarantine(self, unit: str, reason: str, error: BaseException) -> bool:
        self._quarantined[unit] = reason
        self._first = self._first or error
        self._fruitless += 1
        self._emit(UnitQuarantined(self._stage, unit, reason))
        left = self._total - self._done - len(self._quarantined)
        if self._fruitless >= HOPELESS and left:
            self._fail(f"; {HOPELESS} failed one after the other, so {left} more were not tried to the end")
        return False

    def settle(self) -> None:
        """Everything was tried.

        Raises:
            StageFailedError: some units are quarantined. It names them all, and the first cause.
        """
        if self._quarantined:
            self._fail("")

    def _fail(self, more: str) -> None:
        unit, reason = next(iter(self._quarantined.items()))
        raise StageFailedError(
            f"{self._stage}: {len(self._quarantined)} of {self._total} units failed for good: "
            f"{', '.join(self._quarantined)}{more}; first cause, unit {unit}: {reason}",
            "the tracebacks are in the run's events; remove the cause, then resume: committed units are kept",
        ) from self._first


def first_line(error: BaseException) -> str:
    """An error's type and the first line of what it says, without secrets."""
    text = redaction.first_line(str(error), 300)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
