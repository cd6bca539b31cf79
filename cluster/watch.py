"""Judges a gang by its heartbeat: which rank is dead, which one hangs. Knows nothing of Ray.

Every rank says every two seconds where it is. Silence means that its process is stopped or cut off. A rank
that speaks but does not get on is harder to tell: in a step all ranks wait for each other, so only when
nobody has moved for long is something wrong. The one that does not wait for others is named, or else the one
furthest behind. Steps soon show how long they take. Meeting, the first step, reading and saving do not, and have
long deadlines; so whoever is in one place for half a minute is told of, with the deadline.
"""

from __future__ import annotations

import statistics
import sys
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from cluster.failures import Reminder
from cluster.pool import Phase
from cluster.storage.traffic import Traffic

BEAT_SECONDS = 2.0
SILENT_SECONDS = 20.0
# Before its first beat a rank unpickles its task, which imports everything.
FIRST_BEAT_SECONDS = 180.0
STEP_SECONDS = 45.0
STEP_TIMES = 20
# While nobody knows how long a step takes: the gang is meeting, or in its first step.
WARM_UP_SECONDS = 600.0
# Without a move while somebody reads or saves. A store that is asked has two minutes for each answer.
STORE_SECONDS = 600.0
NAME_SECONDS, TELL_SECONDS = 30.0, 60.0
NAMED_AT_MOST = 4
# The watch's clock runs only while somebody looks: a driver that was stopped itself accuses nobody.
LONGEST_LOOK_SECONDS = 5.0

_UNHURRIED: tuple[Phase, ...] = ("data", "saving")
_DOING: dict[Phase, str] = {
    "starting": "starting",
    "meeting": "meeting the others",
    "data": "waiting for data",
    "step": "in the step",
    "saving": "saving",
}
_OURS, _TOGETHER = ("pipeline.", "jobs."), "torch.distributed"


@dataclass(frozen=True, slots=True)
class Beat:
    """Where a rank is. `monotonic` is its own machine's clock, for the length of steps and nothing else.

    `line` is the line of code that it is in, and `waits` says that it waits there for other ranks. `traffic` is all
    that its process has moved so far.
    """

    rank: int
    step: int
    phase: Phase
    monotonic: float
    line: str = ""
    waits: bool = False
    traffic: Traffic = field(default_factory=Traffic)


@dataclass(frozen=True, slots=True)
class Lost:
    """A rank that is gone or hangs, and how that is known."""

    rank: int
    reason: str


def doing(thread: int) -> tuple[str, bool]:
    """What a thread of this process does: the innermost line of a stage's code, and whether it waits for other ranks.

    Args:
        thread: Its identifier.
    """
    innermost, waits = "", False
    frame = sys._current_frames().get(thread)
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        waits = waits or module.startswith(_TOGETHER)
        line = f"{module}:{frame.f_lineno}"
        if module.startswith(_OURS):
            return line, waits
        innermost = innermost or line
        frame = frame.f_back
    return innermost, waits


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
        store_seconds: Deadline of reading and saving.
    """

    def __init__(self, world_size: int, pace: Pace, now: float, store_seconds: float = STORE_SECONDS) -> None:
        self._pace, self._looked, self._clock, self._store_seconds = pace, now, 0.0, store_seconds
        self._seen = {
            rank: _Seen(None, 0.0, 0.0, None, Reminder(NAME_SECONDS, TELL_SECONDS)) for rank in range(world_size)
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
        """A line for each rank because of which nobody has moved for half a minute; each comes again every minute."""
        beats = [seen.beat for seen in self._seen.values() if seen.beat is not None]
        mute = [rank for rank, seen in self._seen.items() if seen.beat is None]
        named = mute or [beat.rank for beat in _behind(beats)]
        due = [rank for rank in named if self._seen[rank].reminder.due(self._clock - self._seen[rank].moved)]
        return [self._told(rank, self._seen[rank]) for rank in due[:NAMED_AT_MOST]]

    def _told(self, rank: int, seen: _Seen) -> str:
        waited = f"for {self._clock - seen.moved:.0f} s"
        if seen.beat is None:
            limit = f"{FIRST_BEAT_SECONDS:.0f} s"
            return f"rank {rank} has not been heard of {waited}; its gang is started again after {limit}"
        patience, setting = self._patience()
        return (
            f"rank {rank} has been {_where(seen.beat)} {waited}{_at(seen.beat)}; "
            f"its gang is started again when no rank moves for {patience:.0f} s{setting}"
        )

    def _patience(self) -> tuple[float, str]:
        """Seconds without a move that are too many, with the ranks where they are; and who decides that."""
        phases = {seen.beat.phase for seen in self._seen.values() if seen.beat is not None}
        if phases.intersection(_UNHURRIED):
            return self._store_seconds, " (compute.rank_seconds)"
        return (self._pace.patience() if phases == {"step"} else WARM_UP_SECONDS), ""

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
        """The rank because of which nobody moves, if that has lasted for too long."""
        beats = [seen.beat for seen in self._seen.values() if seen.beat is not None]
        if not beats or len(beats) < len(self._seen):
            return None
        still = self._clock - max(seen.moved for seen in self._seen.values())
        patience, setting = self._patience()
        if still <= patience:
            return None
        last, *level = _behind(beats)
        others = f", as far as {len(level)} other{'s' if len(level) > 1 else ''}" if level else ""
        reason = f"hangs {_where(last)}{others}: no rank moved for {still:.0f} s (limit {patience:.0f} s{setting})"
        return Lost(last.rank, f"{reason}{_at(last)}")


def _behind(beats: Sequence[Beat]) -> list[Beat]:
    """Those that the others wait for, as far as that can be told: of those that wait for nobody the last ones."""
    free = [beat for beat in beats if not beat.waits] or list(beats)
    return [beat for beat in free if beat.step == min(each.step for each in free)]


def _where(beat: Beat) -> str:
    return f"{_DOING[beat.phase]} at step {beat.step}"


def _at(beat: Beat) -> str:
    return f", last seen in {beat.line}" if beat.line else ""
