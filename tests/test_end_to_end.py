"""Whole runs on a real Ray: two workers, gangs of one and two ranks, killed and resumed."""

import contextlib
import random
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.ray_cluster import ray_session
from cluster.storage.path import StoragePath
from jobs import manifest as manifests
from jobs import plan as planning
from jobs.sources import survey
from jobs.workspace import Workspace
from schemas.events import StageStarted
from schemas.records import StageRecord, parse_record
from tests.support import roots, runs
from tests.support.fixtures import write_manifest

pytestmark = pytest.mark.ray

TWO_RANKS = ("--set", "compute.sharding.data=2")


def test_run_on_ray_makes_the_same_bits_as_inline(long_tree: dict[str, Any], one_rank: Path, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.yaml", {**long_tree, "root": str(tmp_path / "root")})
    assert runs.run_inline(manifest, "compute.pool=inline") == runs.digests(one_rank)


def test_two_ranks_that_share_a_batch_train_the_bits_of_one(one_rank: Path, two_ranks: Path) -> None:
    assert runs.digests(two_ranks) == runs.digests(one_rank)


@pytest.mark.chaos
def test_gang_of_two_killed_in_training_resumes_to_the_same_bits(
    long_tree: dict[str, Any], two_ranks: Path, tmp_path: Path
) -> None:
    manifest = write_manifest(tmp_path / "m.yaml", {**long_tree, "root": str(tmp_path / "root")})
    process = runs.start("run", str(manifest), *TWO_RANKS, log=tmp_path / "log")
    deadline = time.monotonic() + 200
    while len(list((tmp_path / "root").glob("dictionaries/tiny/train/*/log/*.json"))) < 2:
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    runs.kill_tree(process)
    assert not list((tmp_path / "root").glob("dictionaries/tiny/train/*/COMMITTED.json"))
    process = runs.start("resume", str(manifest), *TWO_RANKS, log=tmp_path / "log")
    assert process.wait(timeout=runs.PATIENCE) == 0, (tmp_path / "log").read_text()
    assert runs.contents(tmp_path / "root") == runs.contents(two_ranks)


@pytest.mark.chaos
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_run_killed_at_random_moments_resumes_to_the_same_digests(
    seed: int, long_tree: dict[str, Any], one_rank: Path, tmp_path: Path
) -> None:
    """SIGKILL to the driver, Ray and every worker, three times; then `resume` to the end."""
    rng = random.Random(seed)
    manifest = write_manifest(tmp_path / "m.yaml", {**long_tree, "root": str(tmp_path / "root")})
    for _ in range(3):
        verb = "resume" if (tmp_path / "root" / "runs").exists() else "run"
        process = runs.start(verb, str(manifest), log=tmp_path / "log")
        deadline = time.monotonic() + rng.uniform(6.0, 20.0)
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        runs.kill_tree(process)
    verb = "resume" if (tmp_path / "root" / "runs").exists() else "run"
    process = runs.start(verb, str(manifest), log=tmp_path / "log")
    assert process.wait(timeout=runs.PATIENCE) == 0, (tmp_path / "log").read_text()
    assert runs.digests(tmp_path / "root") == runs.digests(one_rank)
    assert sorted(runs.contents(tmp_path / "root")) == sorted(runs.contents(one_rank))
    assert runs.contents(tmp_path / "root") == runs.contents(one_rank)


def test_harvest_killed_between_units_redoes_at_most_one_unit_per_worker(
    long_tree: dict[str, Any], tmp_path: Path
) -> None:
    manifest = write_manifest(tmp_path / "m.yaml", {**long_tree, "root": str(tmp_path / "root")})
    process = runs.start("run", str(manifest), log=tmp_path / "log")
    units: list[Path] = []
    deadline = time.monotonic() + 120
    while len(units) < 4 and time.monotonic() < deadline:
        units = list((tmp_path / "root" / "harvest").glob("*/units/*.json"))
        time.sleep(0.02)
    runs.kill_tree(process)
    assert len(runs.unfinished_units(tmp_path / "root")) <= 2
    before = {path.name: path.stat().st_ino for path in (tmp_path / "root" / "harvest").glob("*/units/*.json")}
    assert len(before) >= 4
    shards = {path: path.stat().st_ino for path in (tmp_path / "root" / "harvest").glob("*/activations.zarr/**/c/**/*")}
    process = runs.start("resume", str(manifest), log=tmp_path / "log")
    deadline = time.monotonic() + 120
    while not list((tmp_path / "root").glob("harvest/*/COMMITTED.json")):
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    # What comes behind the harvest is of no interest here.
    runs.kill_tree(process)
    after = {path.name: path.stat().st_ino for path in (tmp_path / "root" / "harvest").glob("*/units/*.json")}
    # A committed unit's record and every shard that was there are the very same files.
    assert all(after[name] == inode for name, inode in before.items())
    assert all(path.stat().st_ino == inode for path, inode in shards.items())
    seen = roots.told(StoragePath.parse(tmp_path / "root"))
    resumed = [event for event in seen if isinstance(event, StageStarted) and event.stage == "harvest"][-1]
    assert resumed.done >= len(before)


def test_sigterm_ends_the_run_with_75_and_leaves_no_process(long_tree: dict[str, Any], tmp_path: Path) -> None:
    import psutil

    manifest = write_manifest(tmp_path / "m.yaml", {**long_tree, "root": str(tmp_path / "root")})
    process = runs.start("run", str(manifest), log=tmp_path / "log")
    deadline = time.monotonic() + 120
    while not list((tmp_path / "root").glob("harvest/*/units/*.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    assert process.wait(timeout=60) == 75
    last = (tmp_path / "log").read_text().strip().splitlines()[-1]
    assert last == "kilobasis: stopped by SIGTERM; everything committed is kept -> continue with `kilobasis resume`"
    gone, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    assert gone


def test_driver_killed_alone_takes_its_workers_along(long_tree: dict[str, Any], tmp_path: Path) -> None:
    """Two small agents of Ray stay for a minute, until they believe that their cluster is gone; nothing else does."""
    import psutil

    manifest = write_manifest(tmp_path / "m.yaml", {**long_tree, "root": str(tmp_path / "root")})
    process = runs.start("run", str(manifest), log=tmp_path / "log")
    deadline = time.monotonic() + 120
    while not list((tmp_path / "root").glob("harvest/*/units/*.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 4
    process.kill()
    process.wait(timeout=30)
    agents = {"ray::RuntimeEnvAgent", "ray::DashboardAgent"}
    deadline = time.monotonic() + 30
    while (left := runs.titles(children)) - agents and time.monotonic() < deadline:
        time.sleep(0.1)
    for member in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    assert left <= agents


def test_run_on_an_existing_cluster_joins_it_and_leaves_it_running(
    tiny_tree: dict[str, Any], tiny_manifest: Path, tmp_path: Path
) -> None:
    expected = runs.run_inline(tiny_manifest)
    on_ray = {**tiny_tree["compute"], "pool": "ray", "workers": 2}
    manifest = write_manifest(tmp_path / "m.yaml", {**tiny_tree, "root": str(tmp_path / "on_ray"), "compute": on_ray})
    with ray_session(None, 2):
        import ray

        address = ray.get_runtime_context().gcs_address
        process = runs.start("run", str(manifest), "--set", f"compute.address={address}", log=tmp_path / "log")
        assert process.wait(timeout=runs.PATIENCE) == 0, (tmp_path / "log").read_text()
        assert runs.digests(tmp_path / "on_ray") == expected
        assert ray.cluster_resources()["CPU"] == 2
    assert "compute.address" not in (tmp_path / "log").read_text()


def test_cluster_that_does_not_answer_ends_with_75_and_one_line(long_tree: dict[str, Any], tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.yaml", {**long_tree, "root": str(tmp_path / "root")})
    process = runs.start("run", str(manifest), "--set", "compute.address=127.0.0.1:9", log=tmp_path / "log")
    assert process.wait(timeout=runs.PATIENCE) == 75, (tmp_path / "log").read_text()
    last = (tmp_path / "log").read_text().strip().splitlines()[-1]
    assert last.startswith("kilobasis: compute.address 127.0.0.1:9: no Ray cluster answers")
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_ray_client_address_is_refused_as_a_mistake(long_tree: dict[str, Any], tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.yaml", {**long_tree, "root": str(tmp_path / "root")})
    process = runs.start("run", str(manifest), "--set", "compute.address=ray://127.0.0.1:10001", log=tmp_path / "log")
    assert process.wait(timeout=120) == 2
    assert "Ray Client" in (tmp_path / "log").read_text().strip().splitlines()[-1]
    assert not (tmp_path / "root").exists()


def test_memory_stays_below_what_the_plan_printed(one_rank: Path, long_tree: dict[str, Any]) -> None:
    parsed = manifests.load(write_manifest(one_rank.parent / "again.yaml", {**long_tree, "root": str(one_rank)}))
    planned = planning.make(parsed, Workspace.of(parsed), survey(parsed))
    figures = {each.label: each.estimate.memory for each in planned.stages}
    for path in one_rank.rglob("COMMITTED.json"):
        record = parse_record(StageRecord, path.read_bytes(), "here")
        assert record.peak_memory <= figures[record.stage], record.stage
        if not record.stage.startswith("export"):
            assert record.peak_memory > 100 * 2**20, f"{record.stage} measured nothing"
