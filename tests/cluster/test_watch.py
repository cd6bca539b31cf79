"""The judgement over a gang, on a clock that the test turns."""

import re
import threading
import time
import types
from collections.abc import Collection, Sequence

import pytest

from cluster.failures import Backoff, Reminder
from cluster.pool import Phase
from cluster.watch import STORE_SECONDS, Beat, Lost, Pace, Watch, doing


class Clock:
    """A gang of which the test says how long it does what. Time goes in looks of half a second, beats every two."""

    def __init__(self, ranks: int, pace: Pace | None = None, store_seconds: float = STORE_SECONDS) -> None:
        self.pace, self.now, self.ranks = pace or Pace(), 100.0, ranks
        self.watch = Watch(ranks, self.pace, self.now, store_seconds)

    def go(
        self, seconds: float, places: Sequence[tuple[int, Phase] | None], waiting: Collection[int] = ()
    ) -> Lost | None:
        """Let time pass while each rank beats from one place, or not at all; stops when somebody is accused."""
        end = self.now + seconds
        while self.now < end:
            self.now += 0.5
            speak = self.now % 2.0 == 0
            beats = [
                Beat(rank, *place, self.now, "here:1" if waiting else "", rank in waiting)
                for rank, place in enumerate(places)
                if place is not None and speak
            ]
            if lost := self.watch.look(beats, self.now):
                return lost
        return None

    def train_all(self, steps: int) -> None:
        """All ranks take steps of two seconds."""
        for step in range(steps):
            assert self.go(2.0, [(step, "step")] * self.ranks) is None

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
def test_watch_rank_that_waits_for_the_store_is_named_soon_and_accused_after_ten_minutes(phase: Phase) -> None:
    clock = Clock(2)
    clock.train(3, 2.0)
    told: list[str] = []
    began = clock.now
    while (lost := clock.go(1, [(3, phase), (4, "step")])) is None:
        told += clock.watch.slow()
    words = {"data": "waiting for data", "saving": "saving"}
    assert re.fullmatch(
        rf"rank 0 has been {words[phase]} at step 3 for 3\d s; "
        r"its gang is started again when no rank moves for 600 s \(compute.rank_seconds\)",
        told[0],
    )
    assert 10 <= len(told) <= 11
    assert all(line.startswith("rank 0 ") for line in told)
    assert lost.rank == 0
    assert lost.reason.startswith(f"hangs {words[phase]} at step 3: no rank moved for 60")
    assert 600 <= clock.now - began < 610


@pytest.mark.parametrize(
    ("place", "words", "limit"),
    [
        (None, "not been heard of", 180),
        ((0, "starting"), "been starting at step 0", 600),
        ((0, "meeting"), "been meeting the others at step 0", 600),
        ((0, "step"), "been in the step at step 0", 600),
        ((7, "data"), "been waiting for data at step 7", 600),
        ((7, "saving"), "been saving at step 7", 600),
    ],
)
def test_watch_rank_that_hangs_anywhere_is_named_within_a_minute_with_its_deadline(
    place: tuple[int, Phase] | None, words: str, limit: int
) -> None:
    clock = Clock(2)
    # The other one waits for it in a collective.
    other: tuple[int, Phase] = (place[0], "step") if place else (0, "meeting")
    told: list[str] = []
    began, named = clock.now, 0.0
    while (lost := clock.go(1, [other, place], waiting={0})) is None:
        told += clock.watch.slow()
        named = named or (clock.now - began if told else 0.0)
    assert 0 < named < 60
    assert told[0].startswith(f"rank 1 has {words} ")
    assert f" {limit} s" in told[0]
    assert all(line.startswith("rank 1 ") for line in told)
    assert lost.rank == 1
    assert limit <= clock.now - began < limit + 10


def test_watch_deadline_of_reading_and_saving_is_what_the_manifest_says() -> None:
    clock = Clock(1, store_seconds=50.0)
    began = clock.now
    assert clock.go(200, [(3, "saving")]) is not None
    assert 50 <= clock.now - began < 55


def test_watch_rank_that_does_not_wait_for_others_is_named_before_the_one_behind() -> None:
    clock = Clock(3)
    clock.train_all(3)
    lost = clock.go(200, [(4, "step"), (4, "step"), (4, "step")], waiting={0, 2})
    assert lost is not None
    assert lost.rank == 1
    assert lost.reason.endswith("(limit 45 s), last seen in here:1")


def test_watch_many_ranks_that_hang_are_not_all_named() -> None:
    clock = Clock(64)
    assert clock.go(40, [(0, "step")] * 64) is None
    assert len(clock.watch.slow()) == 4


def test_doing_tells_the_line_and_whether_it_waits_for_other_ranks() -> None:
    def work() -> None:
        started.set()
        over.wait()

    for module, told, waits in [
        ("pipeline.dictionary.ranks", r"pipeline\.dictionary\.ranks:\d+", False),
        ("torch.distributed.fake", r"threading:\d+", True),
        ("somewhere", r"threading:\d+", False),
    ]:
        started, over = threading.Event(), threading.Event()
        scope = {"__name__": module, "started": started, "over": over}
        thread = threading.Thread(target=types.FunctionType(work.__code__, scope, closure=work.__closure__))
        thread.start()
        started.wait()
        time.sleep(0.05)
        line, waited = doing(thread.ident or 0)
        over.set()
        thread.join()
        assert re.fullmatch(told, line), line
        assert waited is waits
    assert doing(0) == ("", False)


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
