"""What every pool promises, held against both pools."""

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from cluster.pool import InlinePool, Pool, Rank, Resources
from cluster.ray_cluster import ray_session
from schemas import events
from schemas.errors import ManifestError, NonFiniteError, StageFailedError


def square(value: int) -> int:
    return value * value


def refuse(value: int) -> int:
    if value == 3:
        raise NonFiniteError("unit 3 is not finite", "look at it")
    return value


def die_once(folder: Path, value: int) -> int:
    """The first process that gets a 5 dies of it."""
    mark = folder / "died"
    if value == 5 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return value


def die_always(value: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return value


def threads(_: int) -> tuple[int, int]:
    import torch

    return torch.get_num_threads(), os.getpid()


def rank_sum(rank: Rank) -> float:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=rank.init_method, rank=rank.rank, world_size=rank.world_size)
    total = torch.tensor([float(rank.rank + 1)])
    dist.all_reduce(total)
    rank.emit(events.Note("gang", f"rank {rank.rank}"))
    dist.destroy_process_group()
    return float(total)


def rank_dies_once(folder: Path, rank: Rank) -> float:
    mark = folder / "died"
    if rank.rank == 1 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return rank_sum(rank)


def rank_refuses(rank: Rank) -> None:
    if rank.rank == 1:
        raise ManifestError("rank 1 does not like this", "change it")
    import time

    time.sleep(30)


class PoolContract:
    """Every pool runs tasks, keeps their results apart, and hands on what they raise."""

    def test_map_returns_every_result_with_its_index(self, pool: Pool) -> None:
        found = dict(pool.map(square, [1, 2, 3, 4, 5], Resources(), lambda event: None, "s"))
        assert found == {0: 1, 1: 4, 2: 9, 3: 16, 4: 25}

    def test_map_of_nothing_returns_nothing(self, pool: Pool) -> None:
        assert list(pool.map(square, [], Resources(), lambda event: None, "s")) == []

    def test_map_raises_what_a_task_raises(self, pool: Pool) -> None:
        with pytest.raises(NonFiniteError) as caught:
            list(pool.map(refuse, [1, 2, 3, 4], Resources(), lambda event: None, "s"))
        assert caught.value.what == "unit 3 is not finite"
        assert caught.value.remedy == "look at it"

    def test_map_holds_torch_to_the_threads_asked_for(self, pool: Pool) -> None:
        ((_, (count, _)),) = pool.map(threads, [0], Resources(threads=1), lambda event: None, "s")
        assert count == 1

    def test_gang_of_one_returns_what_it_returned(self, pool: Pool) -> None:
        seen: list[events.Event] = []
        assert pool.gang(rank_sum, 1, Resources(), seen.append, "s") == 1.0


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    with ray_session(None, 2):
        yield


class TestInlinePool(PoolContract):
    @pytest.fixture
    def pool(self) -> Pool:
        return InlinePool()

    def test_gang_of_two_is_refused(self, pool: Pool) -> None:
        with pytest.raises(ValueError, match="1 rank"):
            pool.gang(rank_sum, 2, Resources(), lambda event: None, "s")


@pytest.mark.ray
class TestRayPool(PoolContract):
    @pytest.fixture
    def pool(self, session: None) -> Pool:
        from cluster.ray_pool import RayPool

        return RayPool(workers=2, retries=2)

    def test_map_uses_as_many_processes_as_workers(self, pool: Pool) -> None:
        found = list(pool.map(threads, list(range(8)), Resources(), lambda event: None, "s"))
        processes = {process for _, (_, process) in found}
        assert len(processes) == 2
        assert os.getpid() not in processes

    def test_map_replaces_a_worker_that_dies_and_reruns_its_task(self, pool: Pool, tmp_path: Path) -> None:
        seen: list[events.Event] = []
        work = partial(die_once, tmp_path)
        found = dict(pool.map(work, [1, 5, 2, 7, 8], Resources(), seen.append, "s"))
        assert found == {0: 1, 1: 5, 2: 2, 3: 7, 4: 8}
        lost = [event for event in seen if isinstance(event, events.WorkerLost)]
        assert len(lost) == 1

    def test_map_gives_up_when_workers_keep_dying(self, pool: Pool) -> None:
        with pytest.raises(StageFailedError, match="3 workers died"):
            list(pool.map(die_always, [1, 2], Resources(), lambda event: None, "s"))

    def test_gang_of_two_meets_and_its_events_arrive(self, pool: Pool) -> None:
        seen: list[events.Event] = []
        assert pool.gang(rank_sum, 2, Resources(), seen.append, "s") == 3.0
        assert {event.text for event in seen if isinstance(event, events.Note)} >= {"rank 0"}

    def test_gang_starts_again_when_a_rank_dies(self, pool: Pool, tmp_path: Path) -> None:
        seen: list[events.Event] = []
        assert pool.gang(partial(rank_dies_once, tmp_path), 2, Resources(), seen.append, "s") == 3.0
        assert sum(isinstance(event, events.WorkerLost) for event in seen) == 1

    def test_gang_raises_what_a_rank_raises_without_waiting_for_the_others(self, pool: Pool) -> None:
        import time

        began = time.monotonic()
        with pytest.raises(ManifestError, match="rank 1 does not like this"):
            pool.gang(rank_refuses, 2, Resources(), lambda event: None, "s")
        assert time.monotonic() - began < 25

    def test_session_sweeps_what_a_killed_one_left(self, session: None) -> None:
        import subprocess
        import sys

        from cluster import ray_cluster

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

    def test_session_of_ours_listens_on_loopback_only(self, session: None) -> None:
        import psutil
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
