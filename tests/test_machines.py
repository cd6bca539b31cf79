"""A cluster of machines that share nothing but a network and an object store, and jobs that are submitted from outside.

Each machine is a set of namespaces of this one. `make test` has one short job, `make chaos` those that lose machines.
"""

import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from jobs import repair as repairs
from schemas.events import UnitFailed, UnitQuarantined, WorkerLost
from tests.support import namespaces, roots, runs
from tests.support.fixtures import make_corpus, make_model, manifest_tree, write_manifest
from tests.support.namespaces import Machine, Network
from tests.support.ray_machines import HEAD, IMPATIENT, RayMachines
from tests.support.servers.ceph import CephServer
from tests.support.servers.fixtures import REQUIRED, require
from tests.support.servers.s3 import s3_client
from tests.support.stores import reach

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]

SECONDS = 900.0
CUT_SECONDS = 30.0
STAGES = ("tokenize", "harvest", "train", "evaluate", "catalog", "export")
# Every machine has one CPU: two ranks need two machines.
COMPUTE = {
    "workers": 3, "threads": 1, "rank_threads": 1, "sharding": {"data": 2}, "checkpoint_seconds": 1.0,
    "lease_seconds": 10,
}  # fmt: skip
# Where nobody is lost, a machine that is only slow must not be taken for dead.
PATIENT: dict[str, str] = {}
INLINE = ("compute.pool=inline", "compute.sharding.data=1")
QUICKSTART = runs.ROOT / "jobs" / "manifests" / "quickstart.yaml"


class World(NamedTuple):
    """A network, the store that everybody on it reaches at this machine's address, and commands given to it."""

    network: Network
    ceph: CephServer
    given: list[subprocess.Popen[bytes]]

    def machines(self, workers: int, patience: Mapping[str, str]) -> RayMachines:
        return RayMachines(self.network, self.ceph.environment, workers, patience)


@pytest.fixture
def world() -> Iterator[World]:
    if why := namespaces.missing():
        if "namespaces" in os.environ.get(REQUIRED, "").split():
            pytest.fail(f"{why}, but {REQUIRED} asks for them", pytrace=False)
        pytest.skip(why)
    require(CephServer)
    with Network() as network, CephServer(host=network.address) as ceph:
        world = World(network, ceph, [])
        yield world
        for command in world.given:
            runs.kill_tree(command)


class Alone(NamedTuple):
    """A manifest whose model and corpus lie beside it, and what a process without a cluster makes of it."""

    tree: dict[str, Any]
    folder: Path
    digests: dict[str, str]


def alone(tree: dict[str, Any], folder: Path) -> Alone:
    manifest = write_manifest(folder / "alone.yaml", {**tree, "root": str(folder / "alone")})
    return Alone(tree, folder, runs.run_inline(manifest, *INLINE))


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """Long enough to lose a machine in every stage."""
    folder = tmp_path_factory.mktemp("long")
    corpus = make_corpus(folder / "corpus", count=1500, files=6)
    tree = manifest_tree(make_model(folder / "model"), corpus, Path("unset"))
    tree["harvest"] |= {"unit_rows": 1536, "chunk_rows": 256, "tokens": 24 * 1536}
    tree["dictionaries"][0]["features"] = 256
    tree["dictionaries"][0]["train"] |= {"tokens": 40_000, "batch": 256}
    return alone({**tree, "compute": COMPUTE}, folder)


class Submitted:
    """A job with a bucket for its root, and who was seen at work in it.

    Args:
        world: Where the root is.
        machines: Where it runs.
        of: What.
        patch: For the variables by which this process reaches the store.
    """

    def __init__(self, world: World, machines: RayMachines, of: Alone, patch: pytest.MonkeyPatch) -> None:
        self.machines, self._of, self._given = machines, of, world.given
        self._endpoint = world.ceph.bucket()
        self.root = reach(self._endpoint, patch) / "root"
        self.manifest = of.folder / f"{self._endpoint.bucket}.yaml"
        write_manifest(self.manifest, {**of.tree, "root": str(self.root)})
        self.log = self.manifest.with_suffix(".log")
        self.at_work: dict[str, set[str]] = {stage: set() for stage in STAGES}
        self.deadline = time.monotonic() + SECONDS
        self.submit()

    def submit(self) -> None:
        self._going = runs.start("submit", str(self.manifest), "--address", self.machines.url, log=self.log)
        self._given.append(self._going)

    def keys(self) -> list[str]:
        """What is in the root."""
        with s3_client(self._endpoint.environment) as client:
            pages = client.get_paginator("list_objects_v2").paginate(Bucket=self._endpoint.bucket, Prefix="root/")
            return [each["Key"].removeprefix("root/") for page in pages for each in page.get("Contents", ())]

    def look(self) -> tuple[str, list[Machine]]:
        """The stage that is being run, and the machines at work."""
        busy = self.machines.at_work()
        keys = [key.split("/") for key in self.keys()]
        stages = [parts[2] if parts[0] == "dictionaries" else parts[0] for parts in keys]
        over = {stage for stage, parts in zip(stages, keys, strict=True) if parts[-1] == "COMMITTED.json"}
        stage = next((stage for stage in STAGES if stage in stages and stage not in over), "")
        if stage:
            self.at_work[stage] |= {machine.name for machine in busy}
        return stage, busy

    def _wait(self, until: Callable[[], bool], codes: tuple[int, ...] = (0,)) -> None:
        while not until():
            assert time.monotonic() < self.deadline, self.log.read_text()[-6000:]
            assert self._going.poll() in (None, *codes), self.log.read_text()[-6000:]
            time.sleep(0.1)

    def wait_for(self, stage: str, machines: int = 1, slots: int = 0) -> list[Machine]:
        """Wait until so many machines are at work in a stage, and its folder has so many units or slots."""
        busy: list[Machine] = []

        def reached() -> bool:
            nonlocal busy
            now, busy = self.look()
            done = [key for key in self.keys() if f"{stage}/" in key and ("/units/" in key or "/log/" in key)]
            assert STAGES.index(now or STAGES[0]) <= STAGES.index(stage), f"{stage} was over too soon"
            assert self._going.poll() is None, f"the job was over before {stage} was seen"
            return now == stage and len(busy) >= machines and len(done) >= slots

        self._wait(reached)
        return busy

    def creep_to(self, stage: str) -> None:
        """Let the driver go on in small steps, so that a stage of an instant is met in its middle."""
        driver = self.machines.driver()
        while self.look()[0] != stage:
            driver.resume()
            time.sleep(0.02)
            driver.suspend()

    def finish(self, code: int = 0) -> None:
        """Wait for the end of the command that follows the job."""

        def over() -> bool:
            self.look()
            return self._going.poll() == code

        self._wait(over, (code,))

    def lose_the_head(self) -> None:
        """A new head knows of nothing. Whoever followed the job is told, and asks again."""
        self.machines.machines[HEAD].fail()
        time.sleep(2.0)
        self.machines.switch_on(HEAD)
        self.finish(75)
        assert "its head was replaced" in self.log.read_text()
        self.submit()

    def lost(self) -> list[str]:
        """Stages, once for each worker that was lost in one; and nothing was blamed on the work itself."""
        seen = roots.told(self.root)
        assert not [event for event in seen if isinstance(event, UnitFailed | UnitQuarantined)]
        return [event.stage.partition("/")[0] for event in seen if isinstance(event, WorkerLost)]

    def require_what_one_process_makes(self) -> None:
        assert runs.run_inline(self.manifest, *INLINE) == self._of.digests
        assert repairs.findings(self.root, full=True) == []


def test_job_submitted_from_outside_makes_on_three_machines_what_one_process_makes(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = manifest_tree(make_model(tmp_path / "model"), make_corpus(tmp_path / "corpus", files=1), Path("unset"))
    job = Submitted(world, world.machines(2, PATIENT), alone({**tree, "compute": COMPUTE}, tmp_path), monkeypatch)
    job.finish()
    assert job.at_work["train"] == {"worker1", "worker2"}
    assert job.lost() == []
    job.require_what_one_process_makes()


@pytest.mark.chaos
def test_machine_that_is_lost_in_every_stage_changes_no_bit(
    world: World, long: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    machines = world.machines(3, IMPATIENT)
    job = Submitted(world, machines, long, monkeypatch)
    for stage in STAGES[:-1]:
        *_, victim = job.wait_for(stage, 2 if stage == "train" else 1, 3 if stage == "train" else 0)
        victim.fail()
        time.sleep(2.0)
        machines.switch_on(victim.name)
    # The last one is the driver's own.
    job.wait_for("catalog", slots=24)
    job.creep_to("export")
    job.lose_the_head()
    job.finish()
    assert set(job.lost()) == set(STAGES[:-1])
    job.require_what_one_process_makes()


@pytest.mark.chaos
def test_head_that_is_lost_and_rebuilt_costs_a_submission(
    world: World, long: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Submitted(world, world.machines(3, IMPATIENT), long, monkeypatch)
    for stage in ("harvest", "train"):
        job.wait_for(stage, slots=4)
        job.lose_the_head()
    job.finish()
    job.require_what_one_process_makes()


@pytest.mark.chaos
@pytest.mark.parametrize("stage", ["harvest", "train"])
def test_machine_without_network_for_half_a_minute_changes_no_bit(
    stage: str, world: World, long: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Submitted(world, world.machines(3, IMPATIENT), long, monkeypatch)
    *_, victim = job.wait_for(stage, 2, 4)
    victim.cut()
    time.sleep(CUT_SECONDS)
    victim.mend()
    job.finish()
    assert set(job.lost()) == {stage}
    job.require_what_one_process_makes()


@pytest.mark.chaos
def test_quickstart_runs_on_three_machines_and_trains_on_two(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = yaml.safe_load(QUICKSTART.read_text())
    tree["compute"] |= {"workers": 3, "sharding": {"data": 2}, "rank_threads": 1}
    (tmp_path / "quickstart").symlink_to(QUICKSTART.parent / "quickstart")
    job = Submitted(world, world.machines(3, PATIENT), alone(tree, tmp_path), monkeypatch)
    job.finish()
    assert job.at_work["harvest"] == {"worker1", "worker2", "worker3"}
    assert len(job.at_work["train"]) == 2
    assert job.lost() == []
    job.require_what_one_process_makes()
