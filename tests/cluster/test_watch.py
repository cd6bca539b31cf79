"""The judgement over a gang, on a clock that the test turns."""

import re
from collections.abc import Sequence

import pytest

from cluster.failures import Backoff, Reminder
from cluster.pool import Phase
from cluster.watch import Beat, Lost, Pace, Watch


class Clock:
    """A gang of which the test says how long it does what. Time goes in looks of half a second, beats every two."""

    def __init__(self, ranks: int, pace: Pace | None = None) -> None:
        self.pace, self.now = pace or Pace(), 100.0
        self.watch = Watch(ranks, self.pace, self.now)

    def go(self, seconds: float, places: Sequence[tuple[int, Phase] | None]) -> Lost | None:
        """Let time pass while each rank beats from one place, or not at all; stops when somebody is accused."""
        end = self.now + seconds
        while self.now < end:
            self.now += 0.5
            speak = self.now % 2.0 == 0
            beats = [Beat(rank, *place, self.now) for rank, place in enumerate(places) if place is not None and speak]
            if lost := self.watch.look(beats, self.now):
                return lost
        return None

    def train(self, steps: int, seconds: float) -> None:
        """Two ranks that take steps."""
        for step in range(steps):
            assert self.go(seconds, [(step, "step"), (step, "step")]) is None


def test_watch_rank_that_is_silent_is_named_after_twenty_seconds() -> None:
    clock = Clock(2)
    clock.train(3, 2.0)
    began = clock.now
    lost = clock.go(60, [(2, "step"), None])
    assert lost is not None
    assert lost.rank == 1
    assert lost.reason == "silent for 20 s, in the step at step 2"
    assert clock.now - began < 23


def test_watch_silence_in_any_phase_is_death() -> None:
    for phase in ("starting", "data", "step", "saving"):
        clock = Clock(2)
        assert clock.go(4, [(0, phase), (0, phase)]) is None
        lost = clock.go(60, [(0, phase), None])
        assert lost is not None
        assert lost.rank == 1


def test_watch_gang_that_hangs_in_a_step_names_the_rank_furthest_behind() -> None:
    clock = Clock(3)
    for step in range(3):
        assert clock.go(2, [(step, "step")] * 3) is None
    began = clock.now
    lost = clock.go(200, [(4, "step"), (3, "step"), (4, "step")])
    assert lost is not None
    assert lost.rank == 1
    assert lost.reason.startswith("hangs in the step at step 3: no rank moved for ")
    assert lost.reason.endswith(" s (limit 45 s)")
    assert 45 <= clock.now - began < 60


def test_watch_slow_steps_have_twenty_times_their_median() -> None:
    clock = Clock(2)
    clock.train(4, 10.0)
    began = clock.now
    lost = clock.go(1000, [(4, "step"), (4, "step")])
    assert lost is not None
    assert 200 <= clock.now - began < 205


def test_watch_first_step_may_take_ten_minutes_and_later_gangs_know_better() -> None:
    first = Clock(2)
    assert first.go(590, [(0, "step"), (0, "step")]) is None
    assert first.go(60, [(0, "step"), (0, "step")]) is not None
    taught = Clock(2)
    taught.train(5, 2.0)
    second = Clock(2, taught.pace)
    assert second.go(60, [(0, "step"), (0, "step")]) is not None


@pytest.mark.parametrize("phase", ["data", "saving"])
def test_watch_rank_that_waits_for_the_store_is_told_but_not_accused(phase: Phase) -> None:
    clock = Clock(2)
    clock.train(3, 2.0)
    told = []
    for _ in range(900):
        assert clock.go(1, [(3, phase), (3, "step")]) is None
        told += clock.watch.slow()
    words = {"data": "waiting for data", "saving": "saving"}
    ours = [line for line in told if line.startswith("rank 0")]
    assert re.fullmatch(rf"rank 0 has been {words[phase]} at step 3 for 6\d s", ours[0])
    assert 14 <= len(ours) <= 15


def test_watch_time_in_another_phase_does_not_count_for_the_step() -> None:
    clock = Clock(2)
    clock.train(3, 2.0)
    assert clock.go(300, [(3, "saving"), (3, "step")]) is None
    assert clock.go(40, [(3, "step"), (3, "step")]) is None
    assert clock.go(10, [(3, "step"), (3, "step")]) is not None


def test_watch_driver_that_was_stopped_accuses_nobody() -> None:
    clock = Clock(2)
    clock.train(3, 2.0)
    clock.now += 500
    assert clock.go(10, [(3, "step"), (3, "step")]) is None


def test_watch_rank_that_returned_is_not_missed() -> None:
    clock = Clock(2)
    clock.train(3, 2.0)
    clock.watch.left(1)
    assert clock.go(100, [(3, "saving"), None]) is None


def test_watch_rank_may_take_three_minutes_to_its_first_beat() -> None:
    clock = Clock(2)
    assert clock.go(178, [(0, "starting"), None]) is None
    lost = clock.go(10, [(0, "starting"), None])
    assert lost is not None
    assert lost.reason == "silent for 180 s, before its first beat"


def test_backoff_doubles_to_half_a_minute_varies_and_starts_again() -> None:
    backoff = Backoff()
    waits = [backoff.wait() for _ in range(2000)]
    for index, wait in enumerate(waits):
        ceiling = min(30.0, 0.2 * 2.0 ** min(index, 10))
        assert ceiling / 2 <= wait <= ceiling
    assert len(set(waits[10:])) > 1900
    backoff.reset()
    assert backoff.wait() <= 0.2


def test_reminder_comes_first_then_regularly_and_again_for_a_new_wait() -> None:
    reminder = Reminder(15.0, 60.0)
    told = [second for second in range(200) if reminder.due(second)]
    assert told == [15, 75, 135, 195]
    assert [second for second in range(80) if reminder.due(second)] == [15, 75]
