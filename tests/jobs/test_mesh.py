"""`compute.sharding: auto`."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.devices import Devices
from jobs import manifest as manifests
from jobs.mesh import resolved, with_mesh
from jobs.sources import survey
from pipeline import train
from schemas.compute import Sharding
from schemas.errors import ManifestError
from schemas.manifest import Manifest
from tests.support.command import invoke
from tests.support.fixtures import write_manifest
from tests.support.servers.processes import free_port


def auto(tree: dict[str, Any], folder: Path, *overrides: str) -> Manifest:
    """The tiny manifest with a mesh to be chosen."""
    tree["compute"] |= {"pool": "ray", "sharding": "auto"}
    return manifests.load(write_manifest(folder / "m.yaml", tree), list(overrides))


def needed(manifest: Manifest, mesh: Sharding) -> int:
    """Bytes of a rank."""
    made = with_mesh(manifest, mesh)
    return train.estimate(made, made.dictionaries[0], survey(manifest)).memory


@pytest.mark.parametrize(
    ("count", "batch", "mesh"),
    [(1, 256, (1, 1)), (4, 256, (1, 4)), (6, 256, (1, 4)), (7, 252, (1, 7)), (3, 256, (1, 2))],
)
def test_ranks_share_the_batch_where_a_dictionary_has_room(
    count: int, batch: int, mesh: tuple[int, int], tiny_tree: dict[str, Any], tmp_path: Path
) -> None:
    manifest = auto(tiny_tree, tmp_path, f"dictionaries.0.train.batch={batch}")
    made = resolved(manifest, survey(manifest), lambda compute: Devices(count, 2**40)).compute.sharding
    assert (made.features, made.data, made.auto) == (*mesh, False)


def test_features_are_shared_by_as_few_as_have_room(tiny_tree: dict[str, Any], tmp_path: Path) -> None:
    manifest = auto(tiny_tree, tmp_path, "dictionaries.0.features=50331648")
    room = needed(manifest, Sharding(features=6, data=2))
    assert needed(manifest, Sharding(features=4, data=4)) > room
    made = resolved(manifest, survey(manifest), lambda compute: Devices(16, room)).compute.sharding
    # 5 do not divide the features.
    assert (made.features, made.data) == (6, 2)


def test_dense_adam_is_never_shared_by_features(tiny_tree: dict[str, Any], tmp_path: Path) -> None:
    manifest = auto(tiny_tree, tmp_path, "dictionaries.0.train.optimizer=adam")
    made = resolved(manifest, survey(manifest), lambda compute: Devices(4, 1)).compute.sharding
    assert (made.features, made.data) == (1, 4)


def test_no_device_is_said(tiny_tree: dict[str, Any], tmp_path: Path) -> None:
    manifest = auto(tiny_tree, tmp_path)
    with pytest.raises(ManifestError, match="nothing has 0 GPUs and 1 CPUs"):
        resolved(manifest, survey(manifest), lambda compute: Devices(0, 0))


def test_auto_and_a_mesh_exclude_each_other(tiny_tree: dict[str, Any], tmp_path: Path) -> None:
    tiny_tree["compute"]["sharding"] = {"auto": True, "data": 2}
    result = invoke("plan", write_manifest(tmp_path / "m.yaml", tiny_tree))
    assert result.code == 2
    assert "give either auto or features and data" in result.err


@pytest.mark.ray
def test_cluster_is_asked_what_it_has(tiny_tree: dict[str, Any], tmp_path: Path) -> None:
    """A real one, whose GPUs are only said to be there."""
    port = free_port()
    ray = str(Path(sys.executable).with_name("ray"))
    address = f"127.0.0.1:{port}"
    begin = [ray, "start", "--head", f"--port={port}", "--node-ip-address=127.0.0.1", "--num-cpus=4", "--num-gpus=4"]
    begin += ["--include-dashboard=false", "--block", "--disable-usage-stats"]
    with subprocess.Popen(begin, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            tiny_tree["compute"] |= {"pool": "ray", "sharding": "auto", "address": address}
            manifest = write_manifest(tmp_path / "m.yaml", tiny_tree)
            result = invoke("plan", manifest, "--json")
            while result.code == 75:
                result = invoke("plan", manifest, "--json")
            assert result.code == 0, result
            assert ranks_of(result.out) == 1
            result = invoke("plan", manifest, "--set", "compute.gpus=1")
            assert result.code == 2
            assert "Ray does not say how much memory a GPU of the cluster has -> set compute.gpu_memory" in result.err
            result = invoke("plan", manifest, "--json", "--set", "compute.gpus=1", "--set", "compute.gpu_memory=8GiB")
            assert ranks_of(result.out) == 4
        finally:
            process.terminate()
            process.wait()


def ranks_of(plan: str) -> int:
    """Of the train stage."""
    (found,) = [stage["workers"] for stage in json.loads(plan) if stage["stage"].startswith("train/")]
    return int(found)
