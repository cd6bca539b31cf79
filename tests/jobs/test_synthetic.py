"""Manifests with a synthetic source, from the command line to the report."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from pydantic import BaseModel
from scipy.optimize import linear_sum_assignment

from jobs import manifest as manifests
from jobs.fingerprint import fingerprint, spec
from jobs.plan import instances
from jobs.sources import survey
from jobs.workspace import label
from pipeline import matching
from pipeline.dictionary.stored import from_files
from pipeline.synthetic.directions import random_directions
from pipeline.synthetic.draws import Split
from pipeline.synthetic.rows import rows
from pipeline.synthetic.world import WorldSource
from schemas.manifest import Manifest
from schemas.synthetic import Toy, World
from tests.support import runs
from tests.support.command import invoke
from tests.support.fixtures import write_manifest
from tests.support.synthetic import PRESET, dense, manifest_tree, toy_tree, world_tree

Tree = dict[str, Any]
TOY = Path(__file__).parents[2] / "jobs" / "manifests" / "toy.yaml"


def written(folder: Path, synthetic: Tree, hook_point: str = "hidden", **train: Any) -> Path:
    return write_manifest(folder / "known.yaml", manifest_tree(synthetic, folder / "root", hook_point, **train))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A finished run of a world: `manifest`, `root`, `result`."""
    folder = tmp_path_factory.mktemp("world")
    manifest = written(folder, world_tree(hierarchy={"roots": 4, "branching": 3, "depth": 1}, bias=0.5))
    result = invoke("run", manifest)
    assert result.code == 0, result.err
    return SimpleNamespace(manifest=manifest, root=folder / "root", result=result)


def only(root: Path, pattern: str) -> Path:
    (found,) = root.glob(pattern)
    return found


def metrics_of(root: Path) -> Any:
    return json.loads(only(root, "dictionaries/small/evaluate/*/metrics.json").read_text())


def dictionary_of(root: Path) -> Any:
    folder = only(root, "dictionaries/small/train/*")
    bodies = [(folder / name).read_bytes() for name in ("dictionary.safetensors", "dictionary.json")]
    return from_files(bodies[:1], bodies[1]).dictionary


def test_recovery_of_a_world_is_what_everything_beside_everything_says(world: SimpleNamespace) -> None:
    """All cosines, and both codes of all held-out rows as matrices."""
    section = World.model_validate(manifests.load(world.manifest).synthetic.model_dump())
    source = WorldSource(section, random_directions(section.features, section.width, section.seed))
    made, dictionary = rows(source, Split.HELDOUT, 0, 2000), dictionary_of(world.root)
    z_NF = torch.zeros(2000, 64)
    z_NK, indices_NK = dictionary.encode(made.x_ND)
    z_NF.scatter_add_(1, indices_NK, z_NK)
    fires_NF, true_NM = z_NF > 0, torch.from_numpy(dense(made.active, section.features)) > 0
    cosine_FM = (
        torch.nn.functional.normalize(dictionary.W_dec, dim=1)
        @ torch.from_numpy(np.asarray(random_directions(section.features, section.width, section.seed))).T
    )
    best_F, best_M = cosine_FM.abs().argmax(1), cosine_FM.abs().argmax(0)

    def f1(mine_N: torch.Tensor, theirs_N: torch.Tensor) -> float:
        both = int((mine_N & theirs_N).sum())
        return 2 * both / max(int(mine_N.sum()) + int(theirs_N.sum()), 1)

    judged = metrics_of(world.root)
    by_learned = [f1(fires_NF[:, f], true_NM[:, m]) for f, m in enumerate(best_F.tolist())]
    assert judged["benchmark"]["f1"] == pytest.approx(float(np.mean(by_learned)), abs=1e-6)
    assert judged["dictionary"]["f1"] == judged["benchmark"]["f1"]
    assert judged["benchmark"]["uniqueness"] == len(set(best_F.tolist())) / 64
    assert judged["benchmark"]["absorption"] is not None
    pairs = linear_sum_assignment(-cosine_FM.abs().numpy())
    assert judged["dictionary"]["mcc"] == pytest.approx(float(cosine_FM.abs().numpy()[pairs].mean()), abs=1e-5)
    assert sum(each["features"] for each in judged["by_fires"]) == 60
    table = pq.read_table(only(world.root, "dictionaries/small/evaluate/*/known.parquet"))
    assert table["matched"].to_pylist() == best_M.tolist()
    by_true = [f1(fires_NF[:, f], true_NM[:, m]) for m, f in enumerate(best_M.tolist())]
    np.testing.assert_allclose(table["f1"].to_numpy(), by_true, atol=1e-6)
    assert "MCC" in world.result.out


def test_plan_of_a_synthetic_manifest_knows_its_rows_and_writes_nothing(tmp_path: Path) -> None:
    result = invoke("plan", written(tmp_path, world_tree()), "--json")
    assert result.code == 0, result.err
    planned = {each["stage"]: each for each in json.loads(result.out)}
    assert list(planned) == ["harvest", "train/small", "evaluate/small", "catalog/small", "export/small"]
    assert (planned["harvest"]["rows"], planned["harvest"]["units"]) == (6000, 3)
    assert not (tmp_path / "root").exists()


def test_plan_has_as_many_units_as_a_run_makes(world: SimpleNamespace) -> None:
    planned = {each["stage"]: each["units"] for each in json.loads(invoke("plan", world.manifest, "--json").out)}
    for place, stage in (("harvest", "harvest"), ("dictionaries/small/evaluate", "evaluate/small")):
        assert len(list(world.root.glob(f"{place}/*/units/*.json"))) == planned[stage]


def test_run_of_a_synthetic_manifest_is_skipped_verified_and_told(world: SimpleNamespace) -> None:
    assert {each["action"] for each in json.loads(invoke("plan", world.manifest, "--json").out)} == {"SKIP"}
    for verb in (["verify", "--full"], ["status"], ["report"], ["gc"]):
        result = invoke(verb[0], world.manifest, *verb[1:])
        assert result.code == 0, (verb, result.err)
    assert invoke("status", world.manifest).out.count("committed") == 5
    assert "MMCS found" in world.result.out
    assert "held out on 2,000 rows" in " ".join(world.result.out.split())


def test_run_twice_makes_the_same_digests(world: SimpleNamespace, tmp_path: Path) -> None:
    tree = manifest_tree(world_tree(hierarchy={"roots": 4, "branching": 3, "depth": 1}, bias=0.5), tmp_path / "root")
    assert runs.run_inline(write_manifest(tmp_path / "m.yaml", tree)) == runs.digests(world.root)


def test_recovery_searched_in_many_spans_is_that_of_one(
    world: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matching, "SPAN", 7)
    manifest = written(tmp_path, world_tree(hierarchy={"roots": 4, "branching": 3, "depth": 1}, bias=0.5))
    planned = {each["stage"]: each["units"] for each in json.loads(invoke("plan", manifest, "--json").out)}
    assert invoke("run", manifest).code == 0
    root = tmp_path / "root"
    units = [path.stem for path in root.glob("dictionaries/small/evaluate/*/units/*.json")]
    assert len(units) == planned["evaluate/small"]
    assert [len([unit for unit in units if unit.startswith(side)]) for side in ("learned", "true")] == [10, 9]
    assert metrics_of(root) == metrics_of(world.root)
    for place in ("evaluate/*/known.parquet", "catalog/*/matches.parquet", "catalog/*/features.parquet"):
        ours, theirs = (pq.read_table(only(each, f"dictionaries/small/{place}")) for each in (root, world.root))
        assert ours.equals(theirs), place


def test_metrics_are_those_of_held_out_rows(world: SimpleNamespace) -> None:
    judged = metrics_of(world.root)
    section = World.model_validate(world_tree(hierarchy={"roots": 4, "branching": 3, "depth": 1}, bias=0.5))
    train = only(world.root, "dictionaries/small/train/*/dictionary.safetensors").parent
    body = (train / "dictionary.safetensors").read_bytes()
    saved = from_files([body], (train / "dictionary.json").read_bytes()).dictionary
    truth_FD = random_directions(60, 12, 0)
    made = rows(WorldSource(section, truth_FD), Split.HELDOUT, 0, 2000)
    with torch.inference_mode():
        z_NK, indices_NK = saved.encode(made.x_ND)
        error = made.x_ND - saved.decode(z_NK, indices_NK)
    fvu = float(error.square().sum() / (made.x_ND - made.x_ND.mean(0)).square().sum())
    assert judged["dictionary"]["fvu"] == pytest.approx(fvu, rel=1e-4)
    assert judged["known"]["known_l0"] == pytest.approx(len(made.active.feature_E) / 2000)
    fired = torch.bincount(indices_NK[z_NK > 0], minlength=64) > 0
    cosine_FM = torch.nn.functional.normalize(saved.W_dec.detach(), dim=1)[fired] @ truth_FD.T
    assert judged["dictionary"]["mmcs_found"] == pytest.approx(float(cosine_FM.max(0).values.mean()), abs=1e-5)
    assert judged["dictionary"]["mmcs_true"] == pytest.approx(float(cosine_FM.max(1).values.mean()), abs=1e-5)
    assert judged["random"]["mmcs_found"] < judged["dictionary"]["mmcs_found"]


def test_oracle_of_directions_without_interference_explains_all_that_k_features_can(tmp_path: Path) -> None:
    """Six features in many neurons, hardly in one another's way, and k for all of them."""
    firing = {"exponent": 0.5, "max_probability": 0.3, "min_probability": 0.1}
    synthetic = world_tree(
        features=6, width=96, firing=firing, interference={"steps": 300, "learning_rate": 0.01}, bias=2.0
    )
    tree = manifest_tree(synthetic, tmp_path / "root")
    tree["dictionaries"][0] |= {"features": 16, "k": 6}
    assert invoke("run", write_manifest(tmp_path / "m.yaml", tree)).code == 0
    judged = metrics_of(tmp_path / "root")
    assert judged["oracle"]["fvu"] < 0.01
    assert judged["oracle"]["l0"] < 6


def test_catalog_names_the_nearest_known_features(world: SimpleNamespace) -> None:
    catalog = only(world.root, "dictionaries/small/catalog/*/matches.parquet").parent
    matches = pq.read_table(catalog / "matches.parquet").to_pydict()
    train = only(world.root, "dictionaries/small/train/*/dictionary.safetensors").parent
    saved = from_files([(train / "dictionary.safetensors").read_bytes()], (train / "dictionary.json").read_bytes())
    unit_FD = torch.nn.functional.normalize(saved.dictionary.W_dec.detach(), dim=1)
    cosine_FM = (unit_FD @ random_directions(60, 12, 0).T).numpy()
    order = np.argsort(-cosine_FM, axis=1, kind="stable")[:, :3]
    assert matches["known"] == order.reshape(-1).tolist()
    np.testing.assert_allclose(matches["cosine"], np.take_along_axis(cosine_FM, order, 1).reshape(-1), atol=1e-6)
    features = pq.read_table(catalog / "features.parquet").to_pydict()
    assert sum(features["fires"]) > 0
    assert features["top_tokens"] == [[]] * 64


def test_catalog_names_more_known_features_than_were_kept_when_it_was_judged(tmp_path: Path) -> None:
    tree = manifest_tree(world_tree(), tmp_path / "root")
    tree["dictionaries"][0]["catalog"]["examples"] = 12
    assert invoke("run", write_manifest(tmp_path / "m.yaml", tree)).code == 0
    matches = pq.read_table(only(tmp_path / "root", "dictionaries/small/catalog/*/matches.parquet")).to_pydict()
    unit_FD = torch.nn.functional.normalize(dictionary_of(tmp_path / "root").W_dec.detach(), dim=1)
    best_FX = (unit_FD @ random_directions(60, 12, 0).T).topk(12, 1)
    assert matches["known"] == best_FX.indices.reshape(-1).tolist()
    np.testing.assert_allclose(matches["cosine"], best_FX.values.reshape(-1).numpy(), atol=1e-6)


def test_table_of_known_features_says_how_often_each_fired_and_which_is_nearest(world: SimpleNamespace) -> None:
    known = pq.read_table(only(world.root, "dictionaries/small/evaluate/*/known.parquet")).to_pydict()
    section = World.model_validate(world_tree(hierarchy={"roots": 4, "branching": 3, "depth": 1}, bias=0.5))
    made = rows(WorldSource(section, random_directions(60, 12, 0)), Split.TRAIN, 0, 6000)
    assert known["fires"] == np.bincount(made.active.feature_E, minlength=60).tolist()
    assert np.mean(known["cosine"]) == pytest.approx(metrics_of(world.root)["dictionary"]["mmcs_found"], abs=1e-5)


def test_export_of_a_synthetic_dictionary_is_a_folder_of_saelens(world: SimpleNamespace) -> None:
    cfg = json.loads(only(world.root, "dictionaries/small/export/*/saelens/cfg.json").read_text())
    assert (cfg["d_in"], cfg["d_sae"], cfg["metadata"]["prepend_bos"]) == (12, 64, False)


def test_toy_of_several_sparsities_runs_with_a_dictionary_for_each(tmp_path: Path) -> None:
    tree = manifest_tree(toy_tree(), tmp_path / "root", "hidden.S0.5")
    tree["dictionaries"][0]["sweep"] = {"hook_point": ["hidden.S0.5", "hidden.S0.95"]}
    assert invoke("run", write_manifest(tmp_path / "m.yaml", tree)).code == 0
    reports = list((tmp_path / "root").glob("dictionaries/*/catalog/*/report.html"))
    assert len(reports) == 2
    assert all("Features per dimension" in report.read_text() for report in reports)


def test_catalog_of_a_toy_names_only_known_features_that_are_represented(tmp_path: Path) -> None:
    assert invoke("run", written(tmp_path, toy_tree(), "hidden.S0.5")).code == 0
    root = tmp_path / "root"
    represented = pq.read_table(only(root, "dictionaries/small/evaluate/*/known.parquet"))["represented"].to_numpy()
    lengths = np.diff(np.flatnonzero(represented), prepend=-1)
    assert 0 < represented.sum() < 12
    assert lengths.max() > 1, "of a toy whose represented features stand in front, numbers would say nothing"
    matches = pq.read_table(only(root, "dictionaries/small/catalog/*/matches.parquet")).to_pydict()
    assert represented[matches["known"]].all()
    body = only(root, "harvest/*/truth/hidden.S0.5.safetensors").read_bytes()
    W_FM = torch.nn.functional.normalize(safetensors.torch.load(body)["W_FM"], dim=1)
    train = only(root, "dictionaries/small/train/*/dictionary.safetensors").parent
    saved = from_files([(train / "dictionary.safetensors").read_bytes()], (train / "dictionary.json").read_bytes())
    cosine_FM = torch.nn.functional.normalize(saved.dictionary.W_dec.detach(), dim=1) @ W_FM.T
    expected = cosine_FM[matches["feature"], matches["known"]]
    np.testing.assert_allclose(matches["cosine"], expected.numpy(), atol=1e-6)


def test_manifest_of_toy_models_recovers_their_features_where_they_are_sparse(tmp_path: Path) -> None:
    """`toy.yaml`, reduced: the paper's figure rises, and MMCS is at least 0.95 in the sparse regime."""
    overrides = [
        f"root={tmp_path / 'root'}",
        "compute.pool=inline",
        "synthetic.features=40",
        "synthetic.hidden=8",
        "synthetic.sparsities=[0.0, 0.9, 0.98]",
        "synthetic.train.steps=1500",
        "synthetic.rows=100k",
        "synthetic.heldout_rows=20k",
        "dictionaries.0.features=40",
        "dictionaries.0.k=2",
        "dictionaries.0.train.tokens=2M",
        "dictionaries.0.sweep={hook_point: [hidden.S0.98]}",
    ]
    runs.run_inline(TOY, *overrides)
    record = json.loads(only(tmp_path / "root", "harvest/*/COMMITTED.json").read_text())
    per_dimension = [each["features_per_dimension"] for each in record["outputs"]["facts"]["toys"]]
    assert per_dimension == sorted(per_dimension)
    assert per_dimension[0] < 1.3 < 3.0 < per_dimension[-1]
    judged = json.loads(only(tmp_path / "root", "dictionaries/*/evaluate/*/metrics.json").read_text())
    assert judged["dictionary"]["mmcs_found"] >= 0.95
    assert judged["dictionary"]["mmcs_true"] >= 0.95


def test_manifest_of_toy_models_can_be_planned(tmp_path: Path) -> None:
    result = invoke("plan", TOY, "--set", f"root={tmp_path / 'root'}")
    assert result.code == 0, result.err


BAD: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "a_model_as_well": ({"model": {"source": "./x"}}, ("synthetic and model are both given",)),
    "a_corpus_as_well": ({"corpus": {"source": "./x"}}, ("synthetic and corpus are both given",)),
    "no_kind": ({"synthetic": {"rows": 5}}, ("synthetic: kind is neither world nor toy",)),
    "unknown_kind": ({"synthetic": {"kind": "dream"}}, ("synthetic: kind is neither world nor toy",)),
    "unknown_key": ({"synthetic": world_tree(featurs=3)}, ("featurs: unknown key", "did you mean 'features'?")),
    "unknown_key_of_a_toy": ({"synthetic": toy_tree(sparsity=3)}, ("sparsity: unknown key", "'sparsities'")),
    "tokens_of_the_harvest": ({"harvest": {"tokens": 5}}, ("harvest.tokens", "synthetic.rows")),
    "unknown_hook_point": ({"harvest": {"hook_points": ["hiden"]}}, ("'hiden'", "['hidden']")),
    "too_many_features": ({"synthetic": world_tree(features=2**20 + 1)}, ("features", "1048576")),
    "too_many_to_push_apart": (
        {"synthetic": world_tree(features=2**20, width=512, interference={"steps": 1})},
        ("1048576 x 512", "interference.steps 1"),
    ),
    "trees_too_large": (
        {"synthetic": world_tree(hierarchy={"roots": 10, "branching": 4, "depth": 2})},
        ("hierarchy has 210 features", "features 60"),
    ),
    "two_ways_to_fire": (
        {"synthetic": world_tree(firing={"l0": 3, "min_probability": 0.1})},
        ("either min_probability or l0",),
    ),
    "l0_too_large": ({"synthetic": world_tree(firing={"l0": 59})}, ("l0 59", "features 60")),
    "limits_exchanged": (
        {"synthetic": world_tree(firing={"max_probability": 0.1, "min_probability": 0.2})},
        ("min_probability 0.2 exceeds max_probability 0.1",),
    ),
    "correlation_too_strong": ({"synthetic": world_tree(correlation={"rank": 90, "strength": 0.1})}, ("at most 0.8",)),
    "preset_changed": (
        {"synthetic": {"kind": "world", "preset": PRESET, "rows": 5, "width": 12}},
        (f"preset {PRESET} sets width",),
    ),
    "sparsity_twice": ({"synthetic": toy_tree(sparsities=[0.5, 0.5])}, ("each once",)),
    "sparsity_of_one": ({"synthetic": toy_tree(sparsities=[1.0])}, ("sparsities.0", "less than 1")),
    "mean_of_zero": ({"synthetic": world_tree(magnitudes={"mean": 0.0})}, ("means above 0",)),
    "std_of_an_exponential": (
        {"synthetic": world_tree(magnitudes={"distribution": "exponential", "std": 1.0})},
        ("leave std out",),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_plan_of_a_bad_synthetic_manifest_is_one_line_and_writes_nothing(case: str, tmp_path: Path) -> None:
    changes, fragments = BAD[case]
    tree = manifest_tree(world_tree(), tmp_path / "root") | changes
    result = invoke("plan", write_manifest(tmp_path / "bad.yaml", tree))
    assert result.code == 2, result
    (line,) = result.err.splitlines()
    assert all(fragment in line for fragment in fragments), line
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"transcode": {"from": "hidden", "to": "other"}, "hook_point": None}, "no rows in common"),
        ({"hook_point": "hidden.S0.5"}, "'hidden.S0.5' is not harvested"),
    ],
)
def test_plan_of_a_dictionary_that_does_not_fit_synthetic_is_one_line(
    change: Tree, fragment: str, tmp_path: Path
) -> None:
    tree = manifest_tree(world_tree(), tmp_path / "root")
    tree["dictionaries"][0] |= change
    result = invoke("plan", write_manifest(tmp_path / "bad.yaml", tree))
    assert (result.code, fragment in result.err) == (2, True), result.err


def test_plan_of_rows_that_positions_would_leave_out_is_one_line(tmp_path: Path) -> None:
    result = invoke("plan", written(tmp_path, world_tree(), filter={"skip_positions": 1}))
    assert (result.code, "skip_positions 1 leaves no row" in result.err) == (2, True), result.err


def fingerprints(path: Path, *overrides: str) -> dict[str, str]:
    manifest = manifests.load(path, list(overrides))
    sources = survey(manifest)
    return {
        label(stage, dictionary).partition("/")[0]: fingerprint(
            spec(stage, stage.params(manifest, dictionary, sources), {})
        )
        for stage, dictionary in instances(manifest)
    }


def leaves(section: type[BaseModel], at: str = "") -> Iterator[str]:
    """Every field, and those of the sections in it."""
    for name, field in section.model_fields.items():
        kinds = [kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type)]
        inner = next((kind for kind in kinds if issubclass(kind, BaseModel)), None)
        if inner is None or name == "std":
            yield at + name
        else:
            yield from leaves(inner, f"{at}{name}.")


# Field -> another value. All of them decide what a row is.
OF_A_WORLD = {
    "features": "61",
    "width": "13",
    "firing.exponent": "0.7",
    "firing.max_probability": "0.25",
    "firing.min_probability": "0.02",
    "magnitudes.mean": "2.0",
    "magnitudes.std": "0.5",
    "hierarchy.roots": "3",
    "hierarchy.branching": "2",
    "hierarchy.depth": "2",
    "hierarchy.exclusive": "false",
    "hierarchy.scaled": "false",
    "hierarchy.compensated": "false",
    "correlation.rank": "3",
    "correlation.strength": "0.2",
    "interference.steps": "2",
    "interference.learning_rate": "0.1",
    "noise": "0.1",
    "bias": "0.1",
    "seed": "1",
}
OF_A_TOY = {
    "model": "linear",
    "features": "13",
    "hidden": "5",
    "sparsities": "[0.5]",
    "importance": "0.9",
    "train.steps": "100",
    "train.batch": "64",
    "train.learning_rate": "0.1",
    "seed": "1",
}
# Not a field that changes alone, and tests of their own.
ELSEWHERE = {"kind", "rows", "heldout_rows", "preset", "firing.l0", "magnitudes.distribution"}
FULL = {"hierarchy": {"roots": 4, "branching": 3, "depth": 1}, "correlation": {"rank": 2, "strength": 0.1}}


def test_fields_of_synthetic_sections_are_all_in_these_tables() -> None:
    assert set(leaves(World)) == OF_A_WORLD.keys() | ELSEWHERE
    assert set(leaves(Toy)) == OF_A_TOY.keys() | {"kind", "rows", "heldout_rows"}


@pytest.mark.parametrize(
    ("kind", "field"), [*(("world", field) for field in OF_A_WORLD), *(("toy", field) for field in OF_A_TOY)]
)
def test_fingerprint_of_a_field_that_decides_rows_changes_with_it(kind: str, field: str, tmp_path: Path) -> None:
    if kind == "world":
        path, value = written(tmp_path, world_tree(**FULL)), OF_A_WORLD[field]
    else:
        path, value = written(tmp_path, toy_tree(), "hidden.S0.5"), OF_A_TOY[field]
    before, after = fingerprints(path), fingerprints(path, f"synthetic.{field}={value}")
    assert before["harvest"] != after["harvest"]


def test_fingerprint_of_the_held_out_rows_changes_what_judges(tmp_path: Path) -> None:
    path = written(tmp_path, world_tree())
    before, after = fingerprints(path), fingerprints(path, "synthetic.heldout_rows=1500")
    assert {name for name in before if before[name] != after[name]} == {"evaluate"}


def test_fingerprint_of_the_rows_changes_the_harvest_alone(tmp_path: Path) -> None:
    path = written(tmp_path, world_tree())
    before, after = fingerprints(path), fingerprints(path, "synthetic.rows=7000")
    assert {name for name in before if before[name] != after[name]} == {"harvest"}


def test_fingerprint_of_a_preset_is_that_of_what_it_sets(tmp_path: Path) -> None:
    short = {"kind": "world", "preset": PRESET, "rows": 6000}
    path = written(tmp_path, short)
    full = manifests.load(path).synthetic
    assert full is not None
    (tmp_path / "full").mkdir()
    spelled = full.model_dump(mode="json", exclude={"preset"})
    assert fingerprints(path) == fingerprints(written(tmp_path / "full", spelled))


def test_manifest_with_a_preset_can_be_written_down_and_read_again(tmp_path: Path) -> None:
    manifest = manifests.load(written(tmp_path, {"kind": "world", "preset": PRESET, "rows": 6000}))
    assert Manifest.model_validate(manifest.model_dump(mode="json")) == manifest
