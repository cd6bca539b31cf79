"""Gangs of real processes: killed, stopped, hung and failing, and what becomes of them."""

import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from cluster import failures, interruption
from cluster.pool import Pool, Rank, Resources
from schemas import events
from schemas.errors import BusyError, InterruptedRunError, NonFiniteError, StageFailedError
from tests.cluster.test_pool import gone, of

pytestmark = pytest.mark.ray


def join(rank: Rank) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=rank.init_method, rank=rank.rank, world_size=rank.world_size)


def rank_sum(rank: Rank) -> float:
    """1 + 2 + ... over the ranks, by gloo; they have met already."""
    import torch
    import torch.distributed as dist

    total = torch.tensor([float(rank.rank + 1)])
    dist.all_reduce(total)
    dist.destroy_process_group()
    rank.emit(events.Note("gang", f"rank {rank.rank}"))
    return float(total)


def life(folder: Path, rank: Rank) -> int:
    """Which life of the gang this is, from 0. Leaves the process's number."""
    (folder / f"{os.getpid()}-{rank.rank}").touch()
    return len(list(folder.glob(f"*-{rank.rank}"))) - 1


def rank_joins(rank: Rank) -> float:
    join(rank)
    return rank_sum(rank)


def rank_gets(number: signal.Signals, folder: Path, rank: Rank) -> float:
    """In the gang's first life rank 1 gets a signal while rank 0 waits for it in a collective."""
    first = life(folder, rank) == 0
    join(rank)
    rank.beat(7, "step")
    if first and rank.rank == 1:
        # A beat or two, so that the driver knows where it was.
        time.sleep(3.0)
        (folder / "signalled").write_text(str(time.time()))
        os.kill(os.getpid(), number)
    return rank_sum(rank)


def rank_hangs_once(folder: Path, rank: Rank) -> str:
    """In the gang's first life rank 1 stays behind in step 3, with a heart that beats, and rank 0 waits for it."""
    if life(folder, rank):
        return "done"
    for step in range(1, 4 if rank.rank else 5):
        rank.beat(step, "step")
        time.sleep(1.0)
    time.sleep(600)
    return "never"


def rank_does_not_like_it(rank: Rank) -> float:
    """Rank 0 finds its connection closed before the driver can hear why."""
    join(rank)
    if rank.rank == 1:
        import torch.distributed as dist

        dist.destroy_process_group()
        time.sleep(2.0)
        raise NonFiniteError("the loss is NaN", "lower the rate")
    return rank_sum(rank)


def rank_raises(commits: int, lives: int, folder: Path, rank: Rank) -> int:
    """Raises in each of its first lives, in the first few of them after a new checkpoint."""
    number = life(folder, rank)
    if number < commits:
        rank.emit(events.CheckpointCommitted("s", number, 0.1))
    if number < lives:
        raise OSError(5, "Input/output error")
    return number


def rank_saves_slowly(folder: Path, rank: Rank) -> None:
    from cluster.storage import create

    def finish(timeout: float) -> None:
        time.sleep(0.5)
        (folder / "finished").touch()

    create.finish = finish  # type: ignore[assignment]
    life(folder, rank)
    rank.emit(events.Note("s", "saving"))
    time.sleep(600)


class Diary:
    """Events as they come; at each loss, the time and which processes of the gang still live."""

    def __init__(self, folder: Path) -> None:
        self.seen: list[events.Event] = []
        self.left: list[list[int]] = []
        self.heard_of_loss = 0.0
        self._folder = folder

    def __call__(self, event: events.Event) -> None:
        self.seen.append(event)
        if isinstance(event, events.WorkerLost):
            self.heard_of_loss = time.time()
            self.left.append([pid for pid in self.pids() if not gone(pid)])

    def pids(self) -> list[int]:
        return [int(path.name.partition("-")[0]) for path in self._folder.glob("*-*")]

    def after_signal(self) -> float:
        """Seconds from the signal to the loss."""
        return self.heard_of_loss - float((self._folder / "signalled").read_text())


@pytest.fixture
def diary(tmp_path: Path) -> Diary:
    return Diary(tmp_path)


@pytest.fixture
def pool(two_cpus: None) -> Iterator[Pool]:
    from cluster.ray_pool import RayPool

    pool = RayPool(workers=2)
    yield pool
    pool.close()


def test_gang_of_two_meets_and_all_its_events_arrive(pool: Pool, diary: Diary) -> None:
    assert pool.gang(rank_joins, 2, Resources(), diary, "s") == 3.0
    assert {event.text for event in of(events.Note, diary.seen)} == {"rank 0", "rank 1"}


def test_gang_whose_rank_is_killed_names_it_and_starts_again(pool: Pool, diary: Diary, tmp_path: Path) -> None:
    assert pool.gang(partial(rank_gets, signal.SIGKILL, tmp_path), 2, Resources(), diary, "s") == 3.0
    (lost,) = of(events.WorkerLost, diary.seen)
    assert lost.doing == "rank 1"
    assert "died in the step at step 7: " in lost.reason
    assert "its worker process has died" in lost.reason
    assert diary.left == [[]]
    print(f"a killed rank was named after {diary.after_signal():.1f} s")
    assert diary.after_signal() < 10


def test_gang_whose_rank_is_stopped_names_it_within_a_minute_and_leaves_no_orphan(
    pool: Pool, diary: Diary, tmp_path: Path
) -> None:
    assert pool.gang(partial(rank_gets, signal.SIGSTOP, tmp_path), 2, Resources(), diary, "s") == 3.0
    (lost,) = of(events.WorkerLost, diary.seen)
    assert lost.doing == "rank 1"
    assert "silent for 20 s, in the step at step 7" in lost.reason
    assert len(diary.pids()) == 4
    assert diary.left == [[]]
    print(f"a stopped rank was named, and its gang gone, after {diary.after_signal():.1f} s")
    assert diary.after_signal() < 40


def test_gang_whose_rank_hangs_names_it_and_starts_again(
    pool: Pool, diary: Diary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cluster import watch

    monkeypatch.setattr(watch, "STEP_SECONDS", 4.0)
    monkeypatch.setattr(watch, "STEP_TIMES", 2)
    assert pool.gang(partial(rank_hangs_once, tmp_path), 2, Resources(), diary, "s") == "done"
    (lost,) = of(events.WorkerLost, diary.seen)
    assert lost.doing == "rank 1"
    assert "hangs in the step at step 3: no rank moved for " in lost.reason
    assert diary.left == [[]]


def test_gang_raises_what_one_rank_knows_although_another_failed_first(pool: Pool, diary: Diary) -> None:
    with pytest.raises(NonFiniteError) as caught:
        pool.gang(rank_does_not_like_it, 2, Resources(), diary, "s")
    assert str(caught.value) == "the loss is NaN -> lower the rate"
    assert not of(events.WorkerLost, diary.seen)


def test_gang_that_fails_five_times_without_a_checkpoint_is_given_up(
    pool: Pool, diary: Diary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failures, "LONGEST", 0.2)
    with pytest.raises(StageFailedError) as caught:
        pool.gang(partial(rank_raises, 0, 99, tmp_path), 1, Resources(), diary, "s")
    assert len(diary.pids()) == 5
    lost = of(events.WorkerLost, diary.seen)
    assert [event.attempt for event in lost] == [1, 2, 3, 4, 5]
    assert caught.value.what.startswith(
        "s: the gang of 1 failed 5 times in a row without a new checkpoint, the last time because of rank 0: pid "
    )
    assert caught.value.what.endswith("raised starting at step 0: OSError: [Errno 5] Input/output error")


def test_gang_that_fails_after_each_checkpoint_goes_on(
    pool: Pool, diary: Diary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cluster import ray_gang

    monkeypatch.setattr(ray_gang, "FAILURES", 2)
    assert pool.gang(partial(rank_raises, 2, 2, tmp_path), 1, Resources(), diary, "s") == 2
    assert len(of(events.WorkerLost, diary.seen)) == 2


def test_gang_that_once_committed_a_checkpoint_is_given_up_all_the_same(
    pool: Pool, diary: Diary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cluster import ray_gang

    monkeypatch.setattr(ray_gang, "FAILURES", 3)
    with pytest.raises(StageFailedError, match="failed 3 times in a row without a new checkpoint"):
        pool.gang(partial(rank_raises, 1, 9, tmp_path), 1, Resources(), diary, "s")
    assert len(diary.pids()) == 3


def test_gang_for_which_there_is_no_room_says_so_and_ends(
    pool: Pool, diary: Diary, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cluster import ray_gang, ray_worker

    monkeypatch.setattr(ray_worker, "START_TELL_SECONDS", 1.0)
    monkeypatch.setattr(ray_gang, "START_SECONDS", 3.0)
    with pytest.raises(BusyError, match=r"s: [123] workers did not start within .* the cluster has 2 CPUs"):
        pool.gang(rank_joins, 3, Resources(), diary, "s")
    (note,) = of(events.Note, diary.seen)
    assert "workers to start since 1 s; each needs 1 CPUs and 0 GPUs" in note.text


def test_interruption_lets_a_rank_finish_its_object(pool: Pool, diary: Diary, tmp_path: Path) -> None:
    def emit(event: events.Event) -> None:
        diary(event)
        if isinstance(event, events.Note):
            raise InterruptedRunError("stopped")

    with pytest.raises(InterruptedRunError):
        pool.gang(partial(rank_saves_slowly, tmp_path), 1, Resources(), emit, "s")
    assert (tmp_path / "finished").exists()
    assert all(gone(pid) for pid in diary.pids())


def test_interruption_does_not_wait_for_the_backoff(
    pool: Pool, diary: Diary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failures, "SHORTEST", 30.0)

    def emit(event: events.Event) -> None:
        diary(event)
        if isinstance(event, events.WorkerLost):
            interruption.request(InterruptedRunError("stopped"))

    with pytest.raises(InterruptedRunError):
        pool.gang(partial(rank_raises, 0, 9, tmp_path), 1, Resources(), emit, "s")
    assert time.time() - diary.heard_of_loss < 3
