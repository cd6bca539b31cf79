"""What every pool promises, held against both pools; and what only a pool of processes has to promise."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster import failures, ray_cluster
from cluster.pool import InlinePool, Pool, Rank, Resources
from schemas import events
from schemas.errors import BusyError, InterruptedRunError, NonFiniteError, StageFailedError


def square(value: int) -> int:
    return value * value


def refuse(value: int) -> int:
    if value == 3:
        raise NonFiniteError("unit 3 is not finite", "look at it")
    return value


def times(folder: Path, value: int) -> int:
    """How often a task was begun, this time included."""
    (folder / f"{value}-{time.monotonic_ns()}-{os.getpid()}").touch()
    return len(list(folder.glob(f"{value}-*")))


def raise_until(folder: Path, fine: int, value: int) -> int:
    """Threes raise until they are tried for the `fine`-th time."""
    if times(folder, value) < fine and value == 3:
        raise OSError(28, "No space left on device")
    return value


def raise_always(value: int) -> int:
    raise RuntimeError(f"{value} is broken")


def die_at_first(folder: Path, deaths: int, value: int) -> int:
    """Odd tasks kill their process, so many times each."""
    if value % 2 and times(folder, value) <= deaths:
        os.kill(os.getpid(), signal.SIGKILL)
    return value


def die_of_three(folder: Path, value: int) -> int:
    if value == 3:
        times(folder, value)
        os.kill(os.getpid(), signal.SIGKILL)
    return value


def stop_at_first(folder: Path, value: int) -> int:
    """The first process that gets a 5 stops there, as one does whose machine swaps or whose disk hangs."""
    if value == 5 and times(folder, value) == 1:
        (folder / "pid").write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(0.2)
    return value


def hang_at_three(folder: Path, value: int) -> int:
    """A three waits for something that never comes, with a process that is well otherwise."""
    times(folder, value)
    if value == 3:
        time.sleep(600)
    return value


def meet(folder: Path, value: int) -> int:
    """Ends when two processes are here."""
    (folder / str(os.getpid())).touch()
    deadline = time.monotonic() + 60
    while len(list(folder.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    return os.getpid()


def write_slowly(folder: Path, takes: float, value: int) -> int:
    """A one is in the middle of an object, which takes so long; a two ends when the one is there."""
    from cluster.storage import create

    def finish(timeout: float) -> None:
        (folder / "asked").write_text(str(timeout))
        time.sleep(takes)
        (folder / "finished").touch()

    if value == 1:
        create.finish = finish  # type: ignore[assignment]
        (folder / "pid").write_text(str(os.getpid()))
        time.sleep(60)
    deadline = time.monotonic() + 60
    while not (folder / "pid").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return value


def threads(_: int) -> tuple[int, int]:
    import torch

    return torch.get_num_threads(), os.getpid()


def rank_alone(rank: Rank) -> int:
    rank.beat(1, "step")
    return rank.world_size


def gone(pid: int) -> bool:
    """Whether a process is no more, or waits for nothing but its parent."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def of(kind: type[Any], seen: list[events.Event]) -> list[Any]:
    return [event for event in seen if isinstance(event, kind)]


def run(
    pool: Pool,
    fn: Callable[[Any], Any],
    tasks: list[Any],
    resources: Resources | None = None,
    name: Callable[[Any], str] = str,
) -> tuple[dict[int, Any], list[events.Event], BaseException | None]:
    """What came of `map`: results by index, each of which may come once only, events, and what it raised."""
    found: dict[int, Any] = {}
    seen: list[events.Event] = []
    try:
        for index, result in pool.map(fn, tasks, resources or Resources(), seen.append, "s", name):
            assert index not in found
            found[index] = result
    except (StageFailedError, BusyError) as error:
        return found, seen, error
    return found, seen, None


class PoolContract:
    """Every pool runs tasks, keeps their results apart, and knows what to do with those that raise."""

    def test_map_returns_every_result_with_its_index(self, pool: Pool) -> None:
        found, seen, error = run(pool, square, [1, 2, 3, 4, 5])
        assert (found, error) == ({0: 1, 1: 4, 2: 9, 3: 16, 4: 25}, None)
        assert set(map(type, seen)) == {events.QueueChanged}

    def test_map_tells_how_much_waits_from_its_beginning_to_its_end(
        self, pool: Pool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("cluster.backlog.SHORTEST", 0.0)
        _, seen, _ = run(pool, square, [1, 2, 3, 4, 5])
        depths = [event.waiting + event.running for event in of(events.QueueChanged, seen)]
        # None are lost on the way, and it only ever falls.
        assert depths[0] == 5
        assert depths[-1] == 0
        assert depths == sorted(depths, reverse=True)
        assert len(depths) > 2

    def test_map_of_nothing_returns_nothing(self, pool: Pool) -> None:
        assert run(pool, square, []) == ({}, [], None)

    def test_map_raises_what_a_task_knows_for_certain(self, pool: Pool) -> None:
        _, seen, error = run(pool, refuse, [1, 2, 3, 4])
        assert isinstance(error, NonFiniteError)
        assert error.what == "unit 3 is not finite"
        assert error.remedy == "look at it"
        assert not of(events.UnitFailed, seen)

    def test_map_tries_a_task_that_raises_again(self, pool: Pool, tmp_path: Path) -> None:
        found, seen, error = run(pool, partial(raise_until, tmp_path, 3), [1, 3, 2])
        assert (found, error) == ({0: 1, 1: 3, 2: 2}, None)
        failed = of(events.UnitFailed, seen)
        assert [(event.unit, event.attempt, event.attempts) for event in failed] == [("3", 1, 3), ("3", 2, 3)]
        assert failed[0].reason == "OSError: [Errno 28] No space left on device"
        assert "raise_until" in failed[0].traceback
        assert "\x1b" not in failed[0].traceback
        assert not of(events.UnitQuarantined, seen)

    def test_map_quarantines_a_task_that_always_raises_and_does_the_others(self, pool: Pool, tmp_path: Path) -> None:
        name = "unit-{}".format
        found, seen, error = run(pool, partial(raise_until, tmp_path, 99), [3, 1, 2, 4], name=name)
        assert found == {1: 1, 2: 2, 3: 4}
        assert len(list(tmp_path.glob("3-*"))) == 3
        assert isinstance(error, StageFailedError)
        assert error.what == (
            "s: 1 of 4 units failed for good: unit-3; first cause, unit unit-3: "
            "OSError: [Errno 28] No space left on device (3 attempts)"
        )
        assert isinstance(error.__cause__, OSError)
        (quarantined,) = of(events.UnitQuarantined, seen)
        assert quarantined.unit == "unit-3"

    def test_map_names_every_quarantined_task(self, pool: Pool) -> None:
        found, seen, error = run(pool, raise_always, [5, 6, 7])
        assert found == {}
        assert isinstance(error, StageFailedError)
        names = error.what.removeprefix("s: 3 of 3 units failed for good: ").partition(";")[0]
        assert sorted(names.split(", ")) == ["5", "6", "7"]
        assert len(of(events.UnitFailed, seen)) == 9

    def test_map_gives_up_early_when_nothing_at_all_succeeds(self, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(failures, "HOPELESS", 4)
        _, _, error = run(pool, raise_always, list(range(50)))
        assert isinstance(error, StageFailedError)
        assert "4 of 50 units failed for good: " in error.what
        assert "so 46 more were not tried to the end" in error.what

    def test_map_holds_torch_to_the_threads_asked_for(self, pool: Pool) -> None:
        found, _, _ = run(pool, threads, [0], Resources(threads=2))
        assert found[0][0] == 2
        found, _, _ = run(pool, threads, [0], Resources(threads=1))
        assert found[0][0] == 1

    def test_gang_of_one_returns_what_it_returned(self, pool: Pool) -> None:
        assert pool.gang(rank_alone, 1, Resources(), lambda event: None, "s") == 1


class TestInlinePool(PoolContract):
    @pytest.fixture
    def pool(self) -> Pool:
        return InlinePool()

    def test_gang_of_two_is_refused(self, pool: Pool) -> None:
        with pytest.raises(ValueError, match="1 rank"):
            pool.gang(rank_alone, 2, Resources(), lambda event: None, "s")

    def test_attempts_are_as_many_as_the_pool_was_told(self, tmp_path: Path) -> None:
        assert run(InlinePool(5), partial(raise_until, tmp_path, 5), [3])[0] == {0: 3}
        assert isinstance(run(InlinePool(1), raise_always, [3])[2], StageFailedError)


@pytest.fixture(scope="module")
def ray_pool(two_cpus: None) -> Iterator[Pool]:
    """One for all tests, so that its workers stay as they do in a stage, except where a test kills them."""
    from cluster.ray_pool import RayPool

    pool = RayPool(workers=2)
    yield pool
    pool.close()


@pytest.mark.ray
class TestRayPool(PoolContract):
    @pytest.fixture
    def pool(self, ray_pool: Pool) -> Pool:
        return ray_pool

    def test_map_uses_as_many_processes_as_workers(self, pool: Pool, tmp_path: Path) -> None:
        found, _, _ = run(pool, partial(meet, tmp_path), [1, 2, 3, 4])
        assert len(set(found.values())) == 2
        assert os.getpid() not in found.values()

    def test_map_in_the_same_stage_keeps_its_processes(self, pool: Pool, tmp_path: Path) -> None:
        first = set(run(pool, partial(meet, tmp_path), [1, 2])[0].values())
        assert set(run(pool, partial(meet, tmp_path), [1, 2])[0].values()) <= first

    def test_map_replaces_workers_that_are_killed_and_loses_no_task(self, pool: Pool, tmp_path: Path) -> None:
        found, seen, error = run(pool, partial(die_at_first, tmp_path, 2), list(range(7)))
        assert (found, error) == ({value: value for value in range(7)}, None)
        lost = of(events.WorkerLost, seen)
        assert [event.attempt for event in lost] == [1, 2, 3, 4, 5, 6]
        assert sorted(event.doing for event in lost) == sorted(2 * ["unit 1", "unit 3", "unit 5"])
        assert all("its worker process has died" in event.reason and "pid " in event.reason for event in lost)

    def test_map_quarantines_a_task_that_kills_five_workers_and_does_the_others(
        self, pool: Pool, tmp_path: Path
    ) -> None:
        found, seen, error = run(pool, partial(die_of_three, tmp_path), [1, 3, 2, 4])
        assert found == {0: 1, 2: 2, 3: 4}
        assert len(list(tmp_path.glob("3-*"))) == 5
        assert isinstance(error, StageFailedError)
        assert "1 of 4 units failed for good: 3; first cause, unit 3: 5 workers in a row died of it (pid" in error.what
        assert len(of(events.WorkerLost, seen)) == 5

    def test_map_replaces_a_worker_that_stopped_without_dying(
        self, pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from cluster import ray_pool

        monkeypatch.setattr(ray_pool, "ASK_SECONDS", 1.0)
        monkeypatch.setattr(ray_pool, "SILENT_SECONDS", 1.5)
        story: list[Any] = []
        for index, _ in pool.map(partial(stop_at_first, tmp_path), list(range(30)), Resources(), story.append, "s"):
            story.append(index)
        results = [each for each in story if isinstance(each, int)]
        assert sorted(results) == list(range(30))
        (lost,) = of(events.WorkerLost, story)
        assert "did not answer for 2 s" in lost.reason
        assert lost.doing == "unit 5"
        # It was missed while the others still had work.
        assert story.index(lost) < story.index(results[-3])
        assert gone(int((tmp_path / "pid").read_text()))

    def test_map_in_which_nothing_ends_says_what_it_waits_for(
        self, pool: Pool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from cluster import ray_pool

        monkeypatch.setattr(ray_pool, "TELL_SECONDS", 1.0)
        _, seen, _ = run(pool, time.sleep, [2.5])
        notes = of(events.Note, seen)
        assert [note.text.partition(";")[0] for note in notes] == [
            "no unit ended for 1 s", "no unit ended for 2 s"
        ]  # fmt: skip
        assert "; in flight: 2.5 for 1 s (pid " in notes[0].text
        assert notes[0].text.endswith("; each has 3600 s (compute.unit_seconds)")

    def test_map_quarantines_a_unit_that_never_ends_although_its_worker_answers(
        self, pool: Pool, tmp_path: Path
    ) -> None:
        from cluster.ray_pool import RayPool

        pool.close()
        hurried = RayPool(workers=2, attempts=2, unit_seconds=2.0)
        try:
            found, seen, error = run(hurried, partial(hang_at_three, tmp_path), [1, 3, 2, 4])
        finally:
            hurried.close()
        assert found == {0: 1, 2: 2, 3: 4}
        assert isinstance(error, StageFailedError)
        assert (
            "1 of 4 units failed for good: 3; first cause, unit 3: TimeoutError: did not end within 2 s" in error.what
        )
        failed = of(events.UnitFailed, seen)
        assert [(event.unit, event.attempt, event.attempts) for event in failed] == [("3", 1, 2), ("3", 2, 2)]
        pids = [int(path.name.rpartition("-")[2]) for path in tmp_path.glob("3-*")]
        assert len(set(pids)) == 2
        assert all(map(gone, pids))
        assert all(f"(compute.unit_seconds); its worker, pid {pid} on " in str(failed) for pid in pids)

    def test_map_goes_on_with_the_workers_that_there_is_room_for(self, pool: Pool) -> None:
        began = time.monotonic()
        found, _, error = run(pool, square, [1, 2, 3], Resources(threads=2))
        assert (found, error) == ({0: 1, 1: 4, 2: 9}, None)
        assert time.monotonic() - began < 30

    def test_wait_for_workers_is_told_and_ends(self, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
        from cluster import ray_pool, ray_worker

        monkeypatch.setattr(ray_worker, "START_TELL_SECONDS", 1.0)
        monkeypatch.setattr(ray_pool, "START_SECONDS", 3.0)
        began = time.monotonic()
        found, seen, error = run(pool, square, [1, 2], Resources(threads=3))
        assert found == {}
        assert isinstance(error, BusyError)
        assert "each needs 3 CPUs and 0 GPUs, the cluster has 2 CPUs (2 free) and 0 GPUs (0 free)" in error.what
        (note,) = of(events.Note, seen)
        assert note.text.startswith("waiting for 2 workers to start since 1 s; each needs 3 CPUs")
        assert note.text.endswith("giving up in 2 s")
        assert time.monotonic() - began < 10

    @pytest.mark.parametrize(("takes", "finishes"), [(0.5, True), (30.0, False)])
    def test_interruption_lets_a_worker_finish_its_object_for_two_seconds(
        self, takes: float, finishes: bool, pool: Pool, tmp_path: Path
    ) -> None:
        results = pool.map(partial(write_slowly, tmp_path, takes), [1, 2, 3], Resources(), lambda event: None, "s")
        assert next(results)[1] in {2, 3}
        began = time.monotonic()
        with pytest.raises(InterruptedRunError):
            results.throw(InterruptedRunError("stopped"))  # type: ignore[attr-defined]
        assert (tmp_path / "asked").read_text() == "2.0"
        assert (tmp_path / "finished").exists() is finishes
        assert time.monotonic() - began < 6
        assert gone(int((tmp_path / "pid").read_text()))

    def test_session_sweeps_what_a_killed_one_left(self, two_cpus: None) -> None:
        child = subprocess.Popen([sys.executable, "-c", "pass"])
        child.wait()
        dead = Path("/tmp") / f"kb-ray-{child.pid}-test"
        living = Path("/tmp") / f"kb-ray-{os.getpid()}-test"
        for folder in (dead, living):
            folder.mkdir()
        try:
            ray_cluster._sweep()
            assert not dead.exists()
            assert living.exists()
        finally:
            living.rmdir()

    def test_session_of_ours_listens_on_loopback_only(self, two_cpus: None) -> None:
        import ray

        listening = []
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
            # Idle workers come and go.
            with suppress(psutil.NoSuchProcess, FileNotFoundError):
                listening += [
                    connection.laddr.ip.removeprefix("::ffff:")
                    for connection in process.net_connections("inet")
                    if connection.status == psutil.CONN_LISTEN
                ]
        assert ray.is_initialized()
        assert len(listening) >= 3
        assert set(listening) == {"127.0.0.1"}
