"""Judges a gang by its heartbeat: which rank is dead, which one hangs. Knows nothing of Ray.

Every rank says every two seconds where it is. Silence means that its process is stopped or cut off. A rank
that speaks but does not get on is harder to tell: in a step all ranks wait for each other, so only when
nobody has moved for long is something wrong, and the one furthest behind is named. Reading data and saving
take as long as the storage takes, which has deadlines of its own; of those the watch only tells.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from cluster.failures import Reminder
from cluster.pool import Phase

BEAT_SECONDS = 2.0
SILENT_SECONDS = 20.0
# Before its first beat a rank unpickles its task, which imports everything.
FIRST_BEAT_SECONDS = 180.0
STEP_SECONDS = 45.0
STEP_TIMES = 20
# While nobody knows how long a step takes: the gang is meeting, or in its first step.
WARM_UP_SECONDS = 600.0
TELL_SECONDS = 60.0
# The watch's clock runs only while somebody looks: a driver that was stopped itself accuses nobody.
LONGEST_LOOK_SECONDS = 5.0

_UNHURRIED: tuple[Phase, ...] = ("data", "saving")


@dataclass(frozen=True, slots=True)
class Beat:
    """Where a rank is. `monotonic` is its own machine's clock, for the length of steps and nothing else."""

    rank: int
    step: int
    phase: Phase
    monotonic: float


@dataclass(frozen=True, slots=True)
class Lost:
    """A rank that is gone or hangs, and how that is known."""

    rank: int
    reason: str


class Pace:
    """How long a step takes. Outlives a gang, so that the next one is judged by what the last one learned."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=64)

    def add(self, seconds: float) -> None:
        """Note a step."""
        self._seconds.append(seconds)

    def patience(self) -> float:
        """Seconds without a step that are too many."""
        if not self._seconds:
            return WARM_UP_SECONDS
        return max(STEP_SECONDS, STEP_TIMES * statistics.median(self._seconds))


@dataclass(slots=True)
class _Seen:
    beat: Beat | None
    heard: float
    moved: float
    stepped: Beat | None
    reminder: Reminder


class Watch:
    """Watches one gang from its start to its end.

    Args:
        world_size: Ranks.
        pace: What is known about the length of steps; learns more.
        now: The time, in seconds of any monotonic clock.
    """

    def __init__(self, world_size: int, pace: Pace, now: float) -> None:
        self._pace, self._looked, self._clock = pace, now, 0.0
        self._seen = {
            rank: _Seen(None, 0.0, 0.0, None, Reminder(TELL_SECONDS, TELL_SECONDS)) for rank in range(world_size)
        }

    def look(self, beats: Iterable[Beat], now: float) -> Lost | None:
        """Take in what was heard since the last look.

        Returns:
            The rank because of which the gang has to be started again, if there is one.
        """
        self._clock += min(now - self._looked, LONGEST_LOOK_SECONDS)
        self._looked = now
        for beat in beats:
            if beat.rank in self._seen:
                self._hear(self._seen[beat.rank], beat)
        return self._silent() or self._hanging()

    def left(self, rank: int) -> None:
        """A rank has returned."""
        self._seen.pop(rank, None)

    def where(self, rank: int) -> str:
        """What was heard last of a rank."""
        seen = self._seen.get(rank)
        return "before its first beat" if seen is None or seen.beat is None else _where(seen.beat)

    def slow(self) -> list[str]:
        """A line for each rank that has been in one place for minutes; each comes once a minute."""
        return [
            f"rank {rank} has been {_where(seen.beat)} for {self._clock - seen.moved:.0f} s"
            for rank, seen in self._seen.items()
            if seen.beat is not None and seen.reminder.due(self._clock - seen.moved)
        ]

    def _hear(self, seen: _Seen, beat: Beat) -> None:
        last = seen.beat
        seen.beat, seen.heard = beat, self._clock
        if last is None or (beat.step, beat.phase) != (last.step, last.phase):
            seen.moved = self._clock
        if seen.stepped is None or beat.step < seen.stepped.step:
            seen.stepped = beat
        elif beat.step > seen.stepped.step:
            self._pace.add((beat.monotonic - seen.stepped.monotonic) / (beat.step - seen.stepped.step))
            seen.stepped = beat

    def _silent(self) -> Lost | None:
        """The rank that has been silent for longest, if that is too long."""
        if not self._seen:
            return None
        rank, seen = min(self._seen.items(), key=lambda item: item[1].heard)
        silence = self._clock - seen.heard
        if silence <= (FIRST_BEAT_SECONDS if seen.beat is None else SILENT_SECONDS):
            return None
        return Lost(rank, f"silent for {silence:.0f} s, {self.where(rank)}")

    def _hanging(self) -> Lost | None:
        """The rank furthest behind, if nobody moves and nobody has a reason for it."""
        beats = [seen.beat for seen in self._seen.values() if seen.beat is not None]
        if not beats or len(beats) < len(self._seen) or any(beat.phase in _UNHURRIED for beat in beats):
            return None
        still = self._clock - max(seen.moved for seen in self._seen.values())
        steady = all(beat.phase == "step" for beat in beats)
        patience = self._pace.patience() if steady else WARM_UP_SECONDS
        if still <= patience:
            return None
        last = min(beats, key=lambda beat: beat.step)
        level = sum(beat.step == last.step for beat in beats)
        others = f", as far as {level - 1} other{'s' if level > 2 else ''}" if level > 1 else ""
        return Lost(
            last.rank, f"hangs {_where(last)}{others}: no rank moved for {still:.0f} s (limit {patience:.0f} s)"
        )


def _where(beat: Beat) -> str:
    doing = {"starting": "starting", "data": "waiting for data", "step": "in the step", "saving": "saving"}
    return f"{doing[beat.phase]} at step {beat.step}"
