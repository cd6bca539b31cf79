"""The harvest of a synthetic source: the same store as any other, and the truth beside it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import zarr

from cluster.pool import InlinePool
from cluster.storage.path import StoragePath
from jobs.out import StageOut
from jobs.sources import survey
from jobs.state import StageFolder
from pipeline import generate
from pipeline.activations.read import Cursor, Stream
from pipeline.activations.source import open_store
from pipeline.stage import Committed
from pipeline.stages import stages_of
from pipeline.synthetic.directions import pushed_apart, random_directions
from pipeline.synthetic.draws import Split
from pipeline.synthetic.rows import rows
from pipeline.truth import open_rows, open_truth, section_of
from schemas.errors import StageFailedError
from schemas.layouts import FIRES, STORE
from schemas.manifest import Manifest
from schemas.training import Filter
from tests.support.synthetic import manifest_tree, toy_tree, world_tree

WORLDS = {
    "plain": world_tree(),
    "hard": world_tree(
        hierarchy={"roots": 4, "branching": 3, "depth": 2},
        correlation={"rank": 2, "strength": 0.3},
        magnitudes={"mean": [2.0, 1.0], "std": 0.5},
        interference={"steps": 20, "learning_rate": 0.01},
        bias=0.5,
        noise=0.05,
    ),
}


def generated(synthetic: dict[str, Any], folder: Path, **harvest: Any) -> Committed:
    tree = manifest_tree(synthetic, folder / "root", "hidden" if synthetic["kind"] == "world" else "hidden.S0.5")
    tree["harvest"] |= harvest
    manifest = Manifest.model_validate(tree)
    stage = stages_of(manifest)[0]
    stage_folder = StageFolder(StoragePath.parse(folder / "harvest"), "harvest", "0" * 64)
    out = StageOut(stage_folder, InlinePool(), manifest.compute, lambda event: None)
    outputs = stage.run({}, stage.params(manifest, None, survey(manifest)), out)
    return stage_folder.commit(outputs, out.records, {}, 0.0, 0)


@pytest.fixture(scope="module", params=[*WORLDS, "toy"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Committed:
    synthetic = WORLDS[request.param] if request.param in WORLDS else toy_tree()
    return generated(synthetic, tmp_path_factory.mktemp(request.param))


def test_store_holds_the_rows_of_the_training_split_for_any_zarr_reader(made: Committed) -> None:
    group = zarr.open_group(str(made.path.local / STORE), mode="r")
    row_N = group["row"][...]
    order = np.argsort(row_N)[-6000:]
    assert row_N[order].tolist() == list(range(6000))
    assert set(group["token"][...].tolist()) == {-1}
    assert set(group["position"][...][order].tolist()) == {0}
    for hook_point in made.facts["layout"]["widths"]:
        expected = rows(open_rows(made, hook_point), Split.TRAIN, 0, 6000).x_ND.numpy()
        np.testing.assert_array_equal(group[hook_point][...][order], expected)
        norms = np.linalg.norm(expected.astype(np.float64), axis=1)
        np.testing.assert_allclose(group[f"{hook_point}-norm"][...][order], norms, rtol=1e-5)


def test_store_is_read_and_proven_whole_by_the_training_stream(made: Committed) -> None:
    hook_point = next(iter(made.facts["layout"]["widths"]))
    store = open_store(made)
    stream = Stream(store, (hook_point,), 0, 500, Filter(), int(made.facts["hashes"][hook_point], 16))
    seen, cursor = 0, Cursor()
    for x_BD, after in stream.batches(Cursor()):
        seen, cursor = seen + len(x_BD), after
        if cursor.epoch:
            break
    assert (seen, cursor.epoch) == (6500, 1)


def test_fires_are_those_of_the_training_rows(made: Committed) -> None:
    fires = safetensors.torch.load((made.path / FIRES).local.read_bytes())
    for hook_point in made.facts["layout"]["widths"]:
        active = rows(open_rows(made, hook_point), Split.TRAIN, 0, 6000).active
        truth = open_truth(made, hook_point)
        assert truth.fires_M.tolist() == np.bincount(active.feature_E, minlength=len(truth)).tolist()
        assert torch.equal(fires[hook_point], truth.fires_M)


def test_truth_of_a_world_is_its_directions_pushed_apart(tmp_path: Path) -> None:
    truth = open_truth(generated(WORLDS["hard"], tmp_path), "hidden")
    expected_FD = pushed_apart(random_directions(60, 12, 0), 20, 0.01)
    torch.testing.assert_close(truth.directions_MD, expected_FD)
    assert truth.represented_M.all()
    assert truth.parent_M[:7].tolist() == [-1, -1, -1, -1, 0, 0, 0]


def test_truth_of_a_toy_is_represented_only_where_its_column_is_long(tmp_path: Path) -> None:
    made = generated(toy_tree(model="linear", importance=0.5, train={"steps": 1500, "batch": 256}), tmp_path)
    truth = open_truth(made, "hidden.S0.5")
    assert truth.represented_M.tolist() == (truth.norm_M >= 0.5).tolist()
    assert 0 < int(truth.represented_M.sum()) < 12
    torch.testing.assert_close(truth.directions_MD.norm(dim=1), torch.ones(12))
    toys = made.facts["toys"]
    assert [each["sparsity"] for each in toys] == [0.5, 0.95]
    square = float(truth.norm_M.square().sum())
    assert toys[0]["features_per_dimension"] == pytest.approx(square / 4, rel=1e-5)


def test_unit_made_again_has_the_same_digest(tmp_path: Path) -> None:
    one, other = (generated(WORLDS["hard"], tmp_path / name) for name in ("one", "other"))
    assert one.record.digest == other.record.digest


def test_identity_of_rows_does_not_know_how_many_there_are_or_what_is_held_out(tmp_path: Path) -> None:
    made = generated(WORLDS["plain"], tmp_path)
    assert generate.identity(section_of(made)) == made.facts["source"]
    assert {"rows", "heldout_rows"}.isdisjoint(made.facts["source"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_canary_allows_what_rounding_does(dtype: str, tmp_path: Path) -> None:
    made = generated(world_tree(bias=0.5), tmp_path, dtype=dtype)
    worst = made.facts["canary"]["hidden"]
    assert worst <= 1e-6 if dtype == "float32" else 0 < worst < 0.02


def test_canary_finds_rows_that_are_not_the_sum_of_their_directions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a kernel that adds up wrongly would do."""
    right = generate.rows

    def wrong(source: Any, split: Split, first: int, end: int) -> Any:
        made = right(source, split, first, end)
        made.x_ND[:, 3] *= 1.02
        return made

    monkeypatch.setattr(generate, "rows", wrong)
    with pytest.raises(StageFailedError, match="canary found stored rows of 'hidden'"):
        generated(WORLDS["plain"], tmp_path)


def test_canary_finds_rows_that_do_not_come_out_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right, calls = generate.rows, [0]

    def wandering(source: Any, split: Split, first: int, end: int) -> Any:
        calls[0] += 1
        return right(source, split, first + 10_000 * (calls[0] > 1), end + 10_000 * (calls[0] > 1))

    monkeypatch.setattr(generate, "rows", wandering)
    with pytest.raises(StageFailedError, match="canary"):
        generated(WORLDS["plain"], tmp_path)
