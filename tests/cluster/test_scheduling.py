"""Where work is placed on a cluster of unlike machines, and what happens when machines come and go."""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cluster.pool import Rank, Resources
from schemas import events
from schemas.errors import BusyError, LeftError
from tests.cluster.test_pool import of
from tests.support import clusters

pytestmark = pytest.mark.ray

GPU = Resources(threads=1, gpus=1.0)


def node_id() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())


def where(_: object) -> str:
    return node_id()


def rank_where(folder: Path, rank: Rank) -> str:
    """Every rank leaves a file that tells its machine."""
    (folder / str(rank.rank)).write_text(node_id())
    return node_id()


def unit(folder: Path, value: int) -> tuple[int, str]:
    """A third of a second of work. Leaves a file when it ends."""
    time.sleep(0.3)
    (folder / f"{value:03d}-{os.getpid()}").write_text(node_id())
    return value, node_id()


def unit_that_waits(folder: Path, value: int) -> int:
    """The first dozen ends at once, the others when they may. Leaves a file when it begins and one when it ends."""
    (folder / f"began-{value}-{os.getpid()}").write_text(node_id())
    if value >= 12:
        eventually((folder / "go").exists, 200.0)
    (folder / f"ended-{value}-{os.getpid()}").write_text(node_id())
    return value


def rank_until_asked(folder: Path, rank: Rank) -> str:
    """Steps until somebody wants it to leave, in its first life; the second one finds what the first has saved."""
    saved = folder / "saved"
    (folder / f"began-{rank.rank}-{time.monotonic_ns()}").write_text(node_id())
    if saved.exists():
        return f"went on at step {saved.read_text()}"
    step = 0
    while not rank.leaving():
        rank.beat(step := step + 1, "step")
        time.sleep(0.1)
    if rank.rank == 0:
        saved.write_text(str(step))
    raise LeftError("s: saved, to leave", "resume")


def eventually(fact: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < deadline
        time.sleep(0.05)


class Machines:
    """A head of two CPUs, and two machines with two CPUs and two GPUs each, as far as Ray is told."""

    def __init__(self) -> None:
        import ray
        from ray.cluster_utils import Cluster

        arguments = {"num_cpus": 2, "node_ip_address": "127.0.0.1", "object_store_memory": 2**27}
        self._arguments: dict[str, Any] = arguments
        self.cluster = Cluster(initialize_head=True, head_node_args={**arguments, "include_dashboard": False})
        ray.init(address=self.cluster.address, log_to_driver=False, logging_level="ERROR")
        self.head = node_id()
        self.large = [self.add(num_gpus=2).node_id for _ in range(2)]

    def add(self, **more: Any) -> Any:
        return self.cluster.add_node(**self._arguments, **more)

    def close(self) -> None:
        import ray

        ray.shutdown()
        self.cluster.shutdown()


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    made = Machines()
    yield made
    made.close()


@pytest.fixture
def pool(machines: Machines) -> Iterator[Any]:
    """Three workers: one more than there are CPUs without a GPU beside them."""
    from cluster.ray_pool import RayPool

    made = RayPool(workers=3)
    yield made
    made.close()


def free(machines: Machines) -> bool:
    """Whether everything that others had is given back, as far as Ray has heard."""
    import ray

    return all(ray.available_resources().get(kind) == ray.cluster_resources().get(kind) for kind in ("CPU", "GPU"))


def gang(pool: Any, machines: Machines, folder: Path, size: int, resources: Resources) -> list[str]:
    """The machine of each rank."""
    eventually(lambda: free(machines))
    pool.gang(partial(rank_where, folder), size, resources, lambda event: None, "s")
    return [(folder / str(rank)).read_text() for rank in range(size)]


def test_gang_that_one_machine_has_room_for_is_on_one(pool: Any, machines: Machines, tmp_path: Path) -> None:
    found = gang(pool, machines, tmp_path, 2, GPU)
    assert found[0] == found[1]
    assert found[0] in machines.large


def test_gang_puts_ranks_of_a_feature_group_on_one_machine(pool: Any, machines: Machines, tmp_path: Path) -> None:
    found = gang(pool, machines, tmp_path, 4, Resources(threads=1, gpus=1.0, together=2))
    assert found[0] == found[1]
    assert found[2] == found[3]
    assert set(found) == set(machines.large)


def test_gang_that_no_machine_has_room_for_is_spread_with_neighbours_together(
    pool: Any, machines: Machines, tmp_path: Path
) -> None:
    found = gang(pool, machines, tmp_path, 3, GPU)
    assert Counter(found).most_common(1)[0][1] == 2
    assert found[0] == found[1] != found[2]


def test_gang_without_gpus_is_kept_off_machines_that_have_some_while_it_can(
    pool: Any, machines: Machines, tmp_path: Path
) -> None:
    assert set(gang(pool, machines, tmp_path, 2, Resources())) == {machines.head}
    assert len(set(gang(pool, machines, tmp_path, 3, Resources()))) == 2


def test_workers_without_gpus_are_kept_off_machines_that_have_some_while_they_can(
    pool: Any, machines: Machines, tmp_path: Path
) -> None:
    eventually(lambda: free(machines))
    for tasks, expected in ((2, {machines.head}), (24, {machines.head, "another"})):
        made = pool.map(partial(unit, tmp_path), list(range(tasks)), Resources(), lambda event: None, "s")
        found = {node for _, (_, node) in made}
        assert machines.head in found
        assert len(found) == len(expected)


def test_gang_for_which_there_is_no_room_says_what_is_missing(
    pool: Any, machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cluster import ray_room

    eventually(lambda: free(machines))
    monkeypatch.setattr(ray_room, "START_TELL_SECONDS", 1.0)
    monkeypatch.setattr(ray_room, "ROOM_SECONDS", 3.0)
    seen: list[events.Event] = []
    with pytest.raises(BusyError) as caught:
        pool.gang(where, 5, GPU, seen.append, "train/a")
    needed = "5 x {CPU: 1, GPU: 1} are needed, the cluster has 4 GPUs free of 4: room for 4"
    assert str(caught.value) == (
        f"train/a: no room for its ranks within 3 s: {needed} -> "
        "lower compute.sharding, rank_threads or gpus, or resume when it is free"
    )
    (note,) = of(events.Note, seen)
    assert note.text.startswith(f"waiting for room since 1 s: {needed}; giving up in ")


def test_machine_that_joins_gets_units_and_one_that_is_taken_away_ends_those_it_has(
    pool: Any, machines: Machines, tmp_path: Path
) -> None:
    """There is work for more workers than there is room for until a machine joins."""
    from cluster.ray_pool import RayPool

    def at(node: str, what: str) -> int:
        return sum(path.read_text() == node for path in tmp_path.glob(f"{what}-*"))

    def told() -> list[str]:
        return [note.text for note in of(events.Note, seen) if "is being taken away" in note.text]

    eventually(lambda: free(machines))
    seen: list[events.Event] = []
    eager = RayPool(workers=7)
    tasks = list(range(40))
    with ThreadPoolExecutor(1) as beside:
        work = partial(unit_that_waits, tmp_path)
        mapped = beside.submit(lambda: list(eager.map(work, tasks, Resources(), seen.append, "s")))
        try:
            eventually(lambda: len(list(tmp_path.glob("ended-*"))) >= 12)
            joined = machines.add().node_id
            eventually(lambda: at(joined, "began") == 1)
            clusters.drain(machines.cluster.address, joined)
            eventually(lambda: bool(told()))
        finally:
            (tmp_path / "go").touch()
        eventually(lambda: clusters.gone(joined))
        made = mapped.result(timeout=120)
    eager.close()
    assert sorted(index for index, _ in made) == tasks
    # It ended the unit that it had and got no other one, and nobody did that again.
    assert at(joined, "began") == at(joined, "ended") == 1
    assert len(list(tmp_path.glob("began-*"))) == len(tasks)
    assert not of(events.WorkerLost, seen)
    (notice,) = told()
    assert notice.startswith("127.0.0.1 is being taken away within ")
    assert notice.endswith(" s: workers that end their unit and leave: 1")


def test_gang_on_a_machine_that_is_taken_away_saves_and_goes_on_elsewhere(
    pool: Any, machines: Machines, tmp_path: Path
) -> None:
    added = machines.add(num_gpus=4).node_id
    eventually(lambda: free(machines))
    seen: list[events.Event] = []
    with ThreadPoolExecutor(1) as beside:
        joined = beside.submit(
            pool.gang, partial(rank_until_asked, tmp_path), 2, Resources(threads=1, gpus=2.0), seen.append, "s"
        )
        eventually(lambda: len(list(tmp_path.glob("began-*"))) == 2)
        # On a machine that leaves, and all of it.
        assert {path.read_text() for path in tmp_path.glob("began-*")} == {added}
        clusters.drain(machines.cluster.address, added)
        assert joined.result(timeout=120).startswith("went on at step ")
    eventually(lambda: clusters.gone(added))
    assert not of(events.WorkerLost, seen)
    leaves, left = (note.text for note in of(events.Note, seen))
    assert leaves.startswith("127.0.0.1 is being taken away within ")
    assert leaves.endswith(" s, with ranks 0, 1 on it: the gang saves, and moves")
    assert left == "s: saved, to leave; its gang starts again on other machines"
    later = sorted(tmp_path.glob("began-*"), key=lambda path: int(path.name.rpartition("-")[2]))[2:]
    assert {path.read_text() for path in later} == set(machines.large)
