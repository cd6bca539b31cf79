"""Every machine of a real cluster of three raylets is asked; one of them reaches another store than the others."""

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from cluster.machine import versions
from cluster.ray_cluster import ray_session
from cluster.ray_examination import Answer, ask
from cluster.storage.objects import forget, names
from cluster.storage.path import StoragePath
from cluster.storage.probe import marked
from tests.support.command import invoke
from tests.support.fixtures import write_manifest
from tests.support.servers.fixtures import require
from tests.support.servers.moto import MotoServer

pytestmark = pytest.mark.ray


@dataclass(frozen=True)
class Machines:
    """The cluster's address, its store's bucket, and the raylet of each machine by name."""

    address: str
    root: StoragePath
    raylets: dict[str, int]


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    require(MotoServer)
    with MotoServer() as ours, MotoServer() as other, pytest.MonkeyPatch.context() as patch:
        bucket = ours.bucket()
        other.make_bucket(bucket.bucket)
        for name, value in {**bucket.environment, "RAY_USAGE_STATS_ENABLED": "0"}.items():
            patch.setenv(name, value)
        forget()
        usual: dict[str, Any] = {"num_cpus": 1, "node_ip_address": "127.0.0.1", "object_store_memory": 2**27}
        cluster = Cluster(
            initialize_head=True, head_node_args={**usual, "include_dashboard": False, "node_name": "head"}
        )
        try:
            nodes = {"head": cluster.head_node}
            nodes["near"] = cluster.add_node(**usual, node_name="near")
            nodes["astray"] = cluster.add_node(**usual, node_name="astray", env_vars=dict(other.environment))
            pids = {name: node.all_processes["raylet"][0].process.pid for name, node in nodes.items()}
            yield Machines(cluster.address, StoragePath.parse(bucket.root) / "root", pids)
        finally:
            cluster.shutdown()
            forget()


def asked(machines: Machines, seconds: float = 100.0) -> dict[str, Answer]:
    with ray_session(machines.address, 0), marked(machines.root) as mark:
        answers = ask(mark, may_overwrite=False, gpus=False, seconds=seconds)
    assert names(machines.root) == []
    assert all(answer.name.endswith(" (127.0.0.1)") for answer in answers)
    return {answer.name.split()[0]: answer for answer in answers}


def test_every_machine_answers_and_one_sees_another_root(machines: Machines) -> None:
    answers = asked(machines)
    assert set(answers) == set(machines.raylets)
    for answer in answers.values():
        assert answer.machine is not None
        assert answer.machine.versions == versions()
        assert (answer.cpus, answer.gpus, answer.failure) == (1, 0, "")
    assert {name: bool(answer.root) for name, answer in answers.items()} == {
        "head": False, "near": False, "astray": True
    }  # fmt: skip
    assert answers["astray"].root.startswith("is another place there")


def test_machine_that_does_not_answer_is_known_in_time(machines: Machines) -> None:
    os.kill(machines.raylets["near"], signal.SIGSTOP)
    try:
        answers = asked(machines, seconds=10.0)
    finally:
        os.kill(machines.raylets["near"], signal.SIGCONT)
    assert {name for name, answer in answers.items() if answer.silent} == {"near"}


def test_run_is_refused_by_name_and_its_root_says_why(
    machines: Machines, tiny_tree: dict[str, Any], tmp_path: Path
) -> None:
    root = machines.root.parent / "refused"
    tiny_tree |= {"root": str(root), "compute": {"pool": "ray", "address": machines.address, "rank_threads": 2}}
    manifest = write_manifest(tmp_path / "m.yaml", tiny_tree)
    result = invoke("run", manifest)
    assert result.code == 2
    said = result.err.splitlines()[-1]
    assert said.startswith(f"kilobasis: machine astray (127.0.0.1): root {root} is another place there: ")
    assert " -> name a bucket that all machines reach" in said
    assert "Traceback" not in result.err
    assert "started" not in result.err
    shown = invoke("list", str(root)).out
    assert "ended with exit code 2" in shown
    assert "machine astray" in shown
    assert sorted(names(root)) == ["ROOT.json", "runs"]
    # What may still work is told beside it.
    assert "train/tiny needs room for 1 x 2 CPUs and 0 GPUs, there is for 0" in invoke("logs", str(root)).out
