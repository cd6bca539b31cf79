"""Whole nodes that go down: a cluster of raylets, one of which is killed in the middle. Slow: `make chaos`.

The cluster is that of a process of its own, because Ray reads how patient it is when it starts.
"""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cluster.pool import Rank, Resources
from cluster.rendezvous import parsed
from schemas import events
from tests.support import clusters
from tests.support.runs import PATIENCE, ROOT

pytestmark = [pytest.mark.chaos, pytest.mark.ray]

UNITS = 24
CODE = "from tests.cluster.test_node_loss import *; scenario({!r}, Path({!r}))"
# A dead node is known after two seconds instead of after twenty.
QUICK = {
    "RAY_health_check_initial_delay_ms": "500",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_failure_threshold": "3",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def unit(folder: Path, value: int) -> int:
    """Half a second of work, then a record that is created once. Whoever comes second finds it there."""
    (folder / "begun" / f"{value:03d}-{time.monotonic_ns()}-{os.getpid()}").touch()
    time.sleep(0.5)
    try:
        with open(folder / "done" / f"{value:03d}", "x") as stream:
            stream.write(str(os.getpid()))
    except FileExistsError:
        pass
    return value


def rank_counts(folder: Path, rank: Rank) -> int:
    """Steps with a barrier in each, and a checkpoint after the tenth."""
    import torch
    import torch.distributed as dist

    from pipeline.dictionary.parallel import meet

    (folder / "begun" / f"rank{rank.rank}-{time.monotonic_ns()}-{os.getpid()}").touch()
    store = meet(rank.rank, rank.world_size, parsed(rank.init_method))
    dist.init_process_group("gloo", store=store, rank=rank.rank, world_size=rank.world_size)
    saved = folder / "saved"
    for step in range(10 if saved.exists() else 0, 40):
        rank.beat(step, "step")
        dist.all_reduce(torch.ones(1))
        time.sleep(0.1)
        if step == 10 and rank.rank == 0:
            saved.touch()
            rank.emit(events.CheckpointCommitted("s", step, 0.0))
    return rank.world_size


def pids(folder: Path) -> set[int]:
    return {int(path.name.rpartition("-")[2]) for path in (folder / "begun").iterdir()}


class Nodes:
    """A head with one CPU, and one more node with one, which can be killed and replaced."""

    def __init__(self) -> None:
        import ray
        from ray.cluster_utils import Cluster

        self._arguments: dict[str, Any] = {
            "num_cpus": 1, "node_ip_address": "127.0.0.1", "object_store_memory": 2**27
        }  # fmt: skip
        self.cluster = Cluster(initialize_head=True, head_node_args={**self._arguments, "include_dashboard": False})
        ray.init(address=self.cluster.address, log_to_driver=False, logging_level="ERROR")
        self.add()

    def add(self) -> None:
        self.node = self.cluster.add_node(**self._arguments)

    def kill(self) -> None:
        """The raylet goes as if the machine had: without a word to anybody."""
        for started in self.node.all_processes["raylet"]:
            os.kill(started.process.pid, signal.SIGKILL)

    def drain(self) -> str:
        """Say that the node is being taken away; its id."""
        clusters.drain(self.cluster.address, self.node.node_id)
        return str(self.node.node_id)

    def replace_when(self, ready: Callable[[], bool]) -> None:
        """Kill the node once something is so, and bring another one a little later."""
        while not ready():
            time.sleep(0.05)
        self.kill()
        time.sleep(4.0)
        self.add()


def scenario(verb: str, folder: Path) -> None:
    """Runs in a process of its own; asserts what has to hold."""
    from cluster import failures, ray_gang
    from cluster.ray_pool import RayPool
    from tests.cluster.test_pool import gone

    # Were the node's death the unit's fault, it would be quarantined at once, and the gang be given up.
    failures.CRASHES = ray_gang.FAILURES = 1
    for name in ("begun", "done"):
        (folder / name).mkdir()
    nodes = Nodes()
    seen: list[events.Event] = []
    pool = RayPool(workers=2)

    def count() -> Counter[int]:
        made = pool.map(partial(unit, folder), range(UNITS), Resources(), seen.append, "s")
        return Counter(result for _, result in made)

    # Nodes can be added by the main thread only.
    with ThreadPoolExecutor(1) as beside:
        if verb == "map":
            counted = beside.submit(count)
            nodes.replace_when(lambda: len(list((folder / "done").iterdir())) >= 6)
            assert counted.result() == Counter(range(UNITS))
            assert len(list((folder / "done").iterdir())) == UNITS
        else:
            joined = beside.submit(pool.gang, partial(rank_counts, folder), 2, Resources(), seen.append, "s")
            nodes.replace_when((folder / "saved").exists)
            assert joined.result() == 2
    pool.close()
    lost = [event for event in seen if isinstance(event, events.WorkerLost)]
    print(*lost, sep="\n")
    assert len(lost) == 1, lost
    assert not [event for event in seen if isinstance(event, (events.UnitFailed, events.UnitQuarantined))]
    if verb == "map":
        assert "node has died" in lost[0].reason
    # The worker of the dead node ended itself, and no other one is left.
    deadline = time.monotonic() + 20
    while not all(map(gone, pids(folder))) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [pid for pid in pids(folder) if not gone(pid)] == []


@pytest.mark.parametrize("verb", ["map", "gang"])
def test_node_that_goes_down_costs_no_unit_and_leaves_no_process(verb: str, tmp_path: Path) -> None:
    process = subprocess.run(
        [
            sys.executable,
            "-c",
            f"from tests.cluster.test_node_loss import *; scenario({verb!r}, Path({str(tmp_path)!r}))",
        ],
        cwd=ROOT,
        env={**os.environ, **QUICK},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    print(process.stdout)
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
