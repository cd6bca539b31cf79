"""What a GPU has no room for is refused before anything starts, with what would fit there."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.devices import Devices
from jobs import manifest as manifests
from jobs.passes import joint
from jobs.room import Room
from jobs.sources import survey
from pipeline import export
from pipeline.device import CARD_MEMORY
from pipeline.stage import Estimate
from schemas.compute import Compute
from schemas.errors import ManifestError
from tests.support.command import invoke
from tests.support.fixtures import write_manifest

GIB = 2**30


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with four of 16 GiB, whose own memory is no bound."""
    monkeypatch.setattr("jobs.room.of_machine", lambda gpus: Devices(4, 16 * GIB))
    monkeypatch.setattr("jobs.mesh.of_machine", lambda gpus: Devices(4, 16 * GIB))
    monkeypatch.setattr("jobs.room.machine_memory", lambda: 2**50)


def told(manifest: Path, *overrides: str) -> str:
    """The refusal of a plan; empty if there is none."""
    result = invoke("plan", manifest, *(word for override in overrides for word in ("--set", override)))
    assert result.code in (0, 2), result
    return str(result.err)


def of_gpus(tree: dict[str, Any], folder: Path) -> Path:
    tree["compute"] |= {"pool": "ray", "gpus": 1.0, "workers": 1}
    return write_manifest(folder / "m.yaml", tree)


@pytest.mark.usefixtures("four_gpus")
def test_dictionary_larger_than_a_gpu_is_refused_with_a_size_that_fits(
    tiny_tree: dict[str, Any], tmp_path: Path
) -> None:
    manifest, features = of_gpus(tiny_tree, tmp_path), "dictionaries.0.features"
    line = told(manifest, f"{features}=67108864")
    assert re.search(r"train/tiny x 1 needs [\d.]+ GiB on a GPU each, there are 16.0 GiB -> ", line), line
    assert "compute.sharding.features to 4" in line
    # What is named is enough for training; the stages behind it are held against a GPU too.
    value = 67108864
    while line := told(manifest, f"{features}={value}", "compute.sharding.features=4"):
        named = re.search(r"(evaluate|catalog)/tiny x 1 needs .* on a GPU .*dictionaries\.0\.features to (\d+)", line)
        assert named, line
        assert int(named[2]) < value
        value = int(named[2])
    assert value > 10_000_000


@pytest.mark.usefixtures("four_gpus")
def test_ranks_of_a_full_machine_are_told_to_share_the_features(tiny_tree: dict[str, Any], tmp_path: Path) -> None:
    manifest, large = of_gpus(tiny_tree, tmp_path), "dictionaries.0.features=67108864"
    line = told(manifest, large, "compute.sharding.data=4")
    assert "-> set compute.sharding to {features: 4, data: 1}" in line
    line = told(manifest, large, "compute.sharding={features: 4, data: 1}")
    assert "evaluate/tiny x 1 needs" in line, "training has room so"


@pytest.mark.usefixtures("four_gpus")
def test_mesh_that_is_advised_cuts_no_subtree(tiny_tree: dict[str, Any], tmp_path: Path) -> None:
    tiny_tree["dictionaries"][0] |= {"features": 72, "tree": {"children": 7}}
    manifest = of_gpus(tiny_tree, tmp_path)
    line = told(manifest, "compute.sharding.features=9")
    assert "features to 3 and data to 1" in line
    assert told(manifest, "compute.sharding.features=3") == ""


@pytest.mark.usefixtures("four_gpus")
def test_workers_that_share_a_gpu_are_told_to_be_fewer(tiny_tree: dict[str, Any], tmp_path: Path) -> None:
    manifest = of_gpus(tiny_tree, tmp_path)
    line = told(manifest, "compute.gpus=0.0625")
    named = re.search(r"harvest x 1 needs .* there are 0\.0625 x 16\.0 GiB -> set compute\.gpus to ([\d.]+)", line)
    assert named, line
    assert told(manifest, f"compute.gpus={named[1]}") == ""


@pytest.mark.usefixtures("four_gpus")
def test_optimizer_that_fills_a_gpu_is_told_to_be_offloaded(tiny_tree: dict[str, Any], tmp_path: Path) -> None:
    manifest, adam = of_gpus(tiny_tree, tmp_path), "dictionaries.0.train.optimizer=adam"
    zero = ["compute.zero.stage=2", "dictionaries.0.features=16777216"]
    line = told(manifest, adam, *zero)
    assert "train/tiny x 1 needs" in line
    assert "compute.zero.offload to cpu" in line
    assert "train/" not in told(manifest, adam, *zero, "compute.zero.offload=cpu")


def test_dictionaries_of_one_pass_share_the_context_of_a_gpu_alone() -> None:
    one = Estimate(units=1, rows=1, stored_bytes=0, objects=1, memory=9, workers=1, shared=4, card=CARD_MEMORY + 5)
    assert joint(one, replace(one, card=CARD_MEMORY + 7)).card == CARD_MEMORY + 12
    assert joint(replace(one, card=0), replace(one, card=0)).card == 0


@pytest.mark.usefixtures("four_gpus")
def test_memory_of_the_machine_is_no_room_on_a_gpu(tiny_tree: dict[str, Any], tmp_path: Path) -> None:
    manifest = of_gpus(tiny_tree, tmp_path)
    assert told(manifest) == ""
    assert "on a GPU" in told(manifest, "compute.gpu_memory=1GiB", "compute.memory=100TiB")


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize(("features", "data", "fits"), [(1, 8, (1, 4)), (2, 4, (2, 2)), (8, 1, (4, 1)), (1, 5, (1, 4))])
def test_mesh_of_more_ranks_than_gpus_is_refused_with_the_nearest(
    features: int, data: int, fits: tuple[int, int], tiny_tree: dict[str, Any], tmp_path: Path
) -> None:
    manifest = of_gpus(tiny_tree, tmp_path)
    mesh = [f"compute.sharding.features={features}", f"compute.sharding.data={data}"]
    line = told(manifest, *mesh, "dictionaries.0.train.batch=320")
    assert f"has {features * data} ranks with a GPU each, this machine has 4 -> " in line
    assert f"features to {fits[0]} and data to {fits[1]}" in line
    nearest = [f"compute.sharding.features={fits[0]}", f"compute.sharding.data={fits[1]}"]
    assert told(manifest, *nearest, "dictionaries.0.train.batch=320") == ""


@pytest.mark.usefixtures("four_gpus")
def test_auto_takes_as_many_feature_ranks_as_a_gpu_asks_for(tiny_tree: dict[str, Any], tmp_path: Path) -> None:
    manifest = of_gpus(tiny_tree, tmp_path)
    large = "dictionaries.0.features=67108864"
    result = invoke("plan", manifest, "--set", "compute.sharding=auto", "--set", large, "--set", "compute.workers=1")
    assert "needs" in result.err
    assert "evaluate/tiny" in result.err, "training itself has room on four"


def test_plan_for_another_machine_is_made_without_its_gpus() -> None:
    """This one has none, or says how much they have; a cluster's are asked once it is joined."""
    there = Room.of(Compute.model_validate({"gpus": 1, "address": "10.0.0.1:6379"}))
    assert (there.memory, there.card, there.ranks) == (None, None, None)
    assert Room.of(Compute.model_validate({"gpus": 1, "gpu_memory": "80GiB", "address": "a:1"})).card == 80 * GIB
    assert Room.of(Compute()).card is None


def test_export_larger_than_an_object_of_a_bucket_is_refused_there_alone(
    tiny_tree: dict[str, Any], tmp_path: Path
) -> None:
    def check(root: str, features: int) -> None:
        overrides = [f"root={root}", f"dictionaries.0.features={features}"]
        manifest = manifests.load(write_manifest(tmp_path / "m.yaml", tiny_tree), overrides)
        sources = survey(manifest)
        (width,) = {sources.model.widths[each.encoded] for each in manifest.dictionaries}
        assert 4 * (2 * width + 1) * features > 5 * 10**9 or features < 2**20
        export.check(manifest, manifest.dictionaries[0], sources)

    check("s3://bucket/root", 64)
    check(str(tmp_path / "root"), 2**26)
    with pytest.raises(ManifestError, match=r"a bucket takes at most 4\.7 GiB in one object"):
        check("s3://bucket/root", 2**26)
