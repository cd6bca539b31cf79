"""Gangs of real processes: killed, stopped, hung and failing, and what becomes of them."""

import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import failures, interruption
from cluster.pool import Pool, Rank, Resources
from cluster.rendezvous import parsed
from schemas import events
from schemas.errors import BusyError, InterruptedRunError, NonFiniteError, OutrunError, StageFailedError
from tests.cluster.test_pool import gone, of

pytestmark = pytest.mark.ray


def join(rank: Rank) -> None:
    import torch.distributed as dist

    from pipeline.dictionary.parallel import meet

    store = meet(rank.rank, rank.world_size, parsed(rank.init_method))
    dist.init_process_group("gloo", store=store, rank=rank.rank, world_size=rank.world_size)


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


def rank_moves(folder: Path, rank: Rank) -> None:
    """Rank 0 moves 1000 bytes each way, rank 1 twice as many."""
    from cluster.storage.create import replace
    from cluster.storage.objects import read_bytes
    from cluster.storage.path import StoragePath

    path = StoragePath.parse(folder / f"of-{rank.rank}")
    replace(path, bytes(1000 * (rank.rank + 1)))
    read_bytes(path)


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


def rank_dies(lives: int, folder: Path, rank: Rank) -> int:
    """Dies in each of its first lives."""
    number = life(folder, rank)
    if number < lives:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def rank_finds_another_trainer(lives: int, folder: Path, rank: Rank) -> int:
    """In each of its first lives, rank 1 hears of it late, and only of rank 0's end."""
    number = life(folder, rank)
    # Or one might be gone before the other has begun, whose first life would be the gang's second.
    join(rank)
    if number < lives and rank.rank == 0:
        raise OutrunError("another trainer under the same lease", "resume")
    if number < lives:
        raise OSError(5, "connection closed by peer")
    return number


def rank_waits_while_another_hangs(folder: Path, rank: Rank) -> str:
    """In the gang's first life rank 1 never comes to the step that rank 0 waits in, though both say the same."""
    first = life(folder, rank) == 0
    join(rank)
    rank.beat(0, "step")
    if first and rank.rank == 1:
        time.sleep(600)
    return "done" if rank_sum(rank) == 3.0 else "wrong"


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


def test_what_all_ranks_have_moved_is_told(pool: Pool, diary: Diary, tmp_path: Path) -> None:
    pool.gang(partial(rank_moves, tmp_path), 2, Resources(), diary, "s")
    told = of(events.StoreUsed, diary.seen)
    assert sum(event.read_bytes for event in told) == sum(event.written_bytes for event in told) == 3000


def test_last_words_are_heard_though_an_earlier_question_is_still_open(pool: Pool) -> None:
    import ray

    from cluster.ray_gang import _Inbox

    inbox = _Inbox()
    assert inbox.read(patience=0.0) == ([], [])
    ray.get(inbox.mailbox.push.remote(events.Note("s", "the last words")))
    mail, _ = inbox.last()
    assert mail == [events.Note("s", "the last words")]


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


def test_gang_whose_rank_hangs_in_its_first_step_names_the_right_one_and_the_deadline(
    pool: Pool, diary: Diary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cluster import watch

    monkeypatch.setattr(watch, "NAME_SECONDS", 5.0)
    monkeypatch.setattr(watch, "WARM_UP_SECONDS", 16.0)
    assert pool.gang(partial(rank_waits_while_another_hangs, tmp_path), 2, Resources(), diary, "s") == "done"
    (lost,) = of(events.WorkerLost, diary.seen)
    assert lost.doing == "rank 1"
    assert "hangs in the step at step 0: no rank moved for " in lost.reason
    assert ", last seen in tests.cluster.test_gang:" in lost.reason
    # On a busy machine ranks take their time to get there as well.
    named = [event.text for event in of(events.Note, diary.seen) if "has been in the step at step 0" in event.text]
    assert named
    assert all(text.startswith("rank 1 ") for text in named)
    assert all(text.endswith("its gang is started again when no rank moves for 16 s") for text in named)
    assert diary.left == [[]]


@pytest.mark.parametrize(("crashed", "lives"), [(True, 2), (False, 4)], ids=["by itself", "from outside"])
def test_gang_is_given_up_for_what_may_be_its_own_doing_only(
    crashed: bool, lives: int, pool: Pool, diary: Diary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who killed the process is told in words of Ray's; a node's death takes a cluster (see test_node_loss)."""
    from cluster import ray_gang, ray_worker

    monkeypatch.setattr(ray_gang, "FAILURES", 2)
    monkeypatch.setattr(failures, "LONGEST", 0.2)
    if not crashed:
        monkeypatch.setattr(ray_worker, "_FROM_OUTSIDE", ("its worker process has died",))
    work = partial(rank_dies, 4, tmp_path)
    if crashed:
        with pytest.raises(StageFailedError, match="failed 2 times in a row without a new checkpoint"):
            pool.gang(work, 1, Resources(), diary, "s")
    else:
        assert pool.gang(work, 1, Resources(), diary, "s") == 4
    assert [event.attempt for event in of(events.WorkerLost, diary.seen)] == list(range(1, lives + 1))


@pytest.mark.parametrize(
    ("detail", "crashed"),
    [
        ("its worker process has died. Worker unexpectedly exits with a connection error code 2. End of file.", True),
        ("its worker process has died. Worker exits with an exit code 3.", True),
        ("its worker process has died. Exit code: 1. The process receives a SIGTERM.", False),
        ("its node has died. Node Id: 77", False),
    ],
)
def test_worker_that_was_ended_from_outside_did_not_crash(
    detail: str, crashed: bool, two_cpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's own words, as they were seen."""
    import ray

    from cluster.ray_worker import Gone, fetch

    class Died(ray.exceptions.ActorDiedError):  # type: ignore[misc]
        def __str__(self) -> str:
            return f"The actor is dead because {detail}"

    def get(_reference: object, timeout: float) -> None:
        raise Died

    monkeypatch.setattr(ray, "get", get)
    outcome = fetch(None)
    assert isinstance(outcome, Gone)
    assert outcome.crashed is crashed


class Cluster:
    """What Ray says of its nodes: the driver's, and another one, which turns out to be dead at the third look."""

    def __init__(self, dies: bool) -> None:
        self.dies, self.looks = dies, 0

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(get_node_id=lambda: "here")

    def nodes(self) -> list[dict[str, Any]]:
        self.looks += 1
        alive = not (self.dies and self.looks >= 3)
        return [{"NodeID": "here", "Alive": True}, {"NodeID": "there", "Alive": alive}]


@pytest.mark.parametrize(
    ("nodes", "dies", "own", "noted"),
    [
        (frozenset({"here", "there"}), True, 0, 1),
        (frozenset({"here", "there"}), False, 5, 1),
        (frozenset({"here"}), True, 5, 0),
    ],
    ids=["node dies", "node lives", "this node"],
)
def test_gang_that_lost_a_node_is_not_to_blame_although_others_were_heard_first(
    nodes: frozenset[str], dies: bool, own: int, noted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cluster import ray_gang

    monkeypatch.setattr(ray_gang, "ray", Cluster(dies))
    monkeypatch.setattr(ray_gang, "NODE_SECONDS", 2.0)
    seen: list[events.Event] = []
    assert ray_gang._own([nodes] * 5, seen.append, "s") == own
    assert len(seen) == noted
    assert all("looking for 2 s whether a node died" in event.text for event in of(events.Note, seen))


def test_gang_that_is_outrun_by_an_older_one_starts_again(
    pool: Pool, diary: Diary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failures, "LONGEST", 0.2)
    assert pool.gang(partial(rank_finds_another_trainer, 1, tmp_path), 2, Resources(), diary, "s") == 1
    (lost,) = of(events.WorkerLost, diary.seen)
    assert "another trainer under the same lease" in lost.reason or "connection closed" in lost.reason


def test_gang_that_is_always_outrun_is_given_up(
    pool: Pool, diary: Diary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cluster import ray_gang

    monkeypatch.setattr(ray_gang, "FAILURES", 2)
    monkeypatch.setattr(failures, "LONGEST", 0.2)
    with pytest.raises(StageFailedError, match="failed 2 times in a row without a new checkpoint"):
        pool.gang(partial(rank_finds_another_trainer, 9, tmp_path), 1, Resources(), diary, "s")


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
    from cluster import ray_room

    monkeypatch.setattr(ray_room, "START_TELL_SECONDS", 1.0)
    monkeypatch.setattr(ray_room, "ROOM_SECONDS", 3.0)
    lack = "3 x {CPU: 1} are needed, the cluster has 2 CPUs free of 2: room for 2"
    with pytest.raises(BusyError, match=f"s: no room for its ranks within 3 s: {lack}"):
        pool.gang(rank_joins, 3, Resources(), diary, "s")
    (note,) = of(events.Note, diary.seen)
    assert note.text.startswith(f"waiting for room since 1 s: {lack}; giving up in ")


def test_gang_is_not_led_from_a_machine_that_is_taken_away(
    pool: Pool, diary: Diary, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    from cluster.ray_notices import Notices

    here = ray.get_runtime_context().get_node_id()
    monkeypatch.setattr(Notices, "leaving", frozenset({here}))
    with pytest.raises(BusyError, match="the machine of this run is being taken away, so no gang can be led from here"):
        pool.gang(rank_joins, 2, Resources(), diary, "s")
    assert not diary.pids()


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
