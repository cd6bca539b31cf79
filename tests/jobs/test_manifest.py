"""Reading a manifest: YAML, overrides, the environment, paths, and its JSON Schema."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from jobs import manifest as manifests
from schemas.errors import ManifestError
from schemas.manifest import Manifest
from tests.support.fixtures import CONTEXT, write_manifest

Tree = dict[str, Any]
QUICKSTART = Path(manifests.__file__).parent / "manifests" / "quickstart.yaml"


def test_load_manifest_gives_its_values_and_the_defaults(tiny_tree: Tree, tmp_path: Path) -> None:
    loaded = manifests.load(write_manifest(tmp_path / "m.yaml", tiny_tree))
    assert loaded.name == "tiny"
    assert loaded.corpus.context == CONTEXT
    assert loaded.harvest.hook_points == tuple(tiny_tree["harvest"]["hook_points"])
    assert loaded.dictionaries[0].train.learning_rate == 3e-3
    assert loaded.harvest.seed == 0
    assert loaded.dictionaries[0].evaluate.baselines == ("random", "pca")
    assert loaded.compute.workers == 2


def test_load_manifest_is_frozen(tiny_manifest: Path) -> None:
    loaded = manifests.load(tiny_manifest)
    with pytest.raises(ValueError, match="frozen"):
        loaded.corpus.context = 8  # type: ignore[misc]


@pytest.mark.parametrize(
    ("written", "count"), [("2M", 2_000_000), ("1.5k", 1500), ("2_000", 2000), (" 7 ", 7), (7.0, 7), ("1B", 10**9)]
)
def test_load_count_with_a_unit_is_a_number(written: object, count: int, tiny_tree: Tree, tmp_path: Path) -> None:
    tiny_tree["harvest"]["tokens"] = written
    assert manifests.load(write_manifest(tmp_path / "m.yaml", tiny_tree)).harvest.tokens == count


@pytest.mark.parametrize(
    ("written", "size"), [("512MiB", 2**29), ("2GB", 2 * 10**9), ("1.5 KiB", 1536), (4096, 4096), ("4096", 4096)]
)
def test_load_size_with_a_unit_is_bytes(written: object, size: int, tiny_tree: Tree, tmp_path: Path) -> None:
    tiny_tree["harvest"]["loader_memory"] = written
    assert manifests.load(write_manifest(tmp_path / "m.yaml", tiny_tree)).harvest.loader_memory == size


def test_load_override_replaces_a_value_in_a_list(tiny_manifest: Path) -> None:
    loaded = manifests.load(tiny_manifest, ["dictionaries.0.train.batch=64", "harvest.hook_points.1=gpt_neox.embed_in"])
    assert loaded.dictionaries[0].train.batch == 64
    assert loaded.harvest.hook_points[1] == "gpt_neox.embed_in"


def test_load_override_makes_the_section_that_is_not_there(tiny_manifest: Path) -> None:
    assert manifests.load(tiny_manifest, ["dictionaries.0.train.filter.skip_positions=3"]).dictionaries[
        0
    ].train.filter.skip_positions == (3)


def test_load_override_value_is_yaml(tiny_manifest: Path) -> None:
    hook_points = "[gpt_neox.layers.1, gpt_neox.embed_in]"
    loaded = manifests.load(tiny_manifest, [f"harvest.hook_points={hook_points}", "model.revision=null"])
    assert loaded.harvest.hook_points == ("gpt_neox.layers.1", "gpt_neox.embed_in")
    assert loaded.model.revision is None


def test_load_override_given_twice_takes_the_last(tiny_manifest: Path) -> None:
    assert manifests.load(tiny_manifest, ["compute.workers=3", "compute.workers=5"]).compute.workers == 5


def test_load_override_value_with_an_equals_sign_is_kept_whole(tiny_manifest: Path) -> None:
    assert manifests.load(tiny_manifest, ["corpus.text_field=a=b"]).corpus.text_field == "a=b"


@pytest.mark.parametrize(("section", "key"), [(None, "root"), ("model", "source"), ("corpus", "source")])
def test_load_variable_is_expanded_in_root_and_sources(
    section: str | None, key: str, tiny_tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KB_PLACE", "/somewhere")
    (tiny_tree[section] if section else tiny_tree)[key] = "${KB_PLACE}/x/${KB_OTHER:-other}"
    loaded = manifests.load(write_manifest(tmp_path / "m.yaml", tiny_tree))
    assert getattr(getattr(loaded, section) if section else loaded, key) == "/somewhere/x/other"


def test_load_variable_elsewhere_stays_as_it_is(
    tiny_tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KB_SECRET", "expanded")
    tiny_tree["corpus"]["text_field"] = "${KB_SECRET}"
    tiny_tree["model"]["revision"] = "${KB_SECRET}"
    tiny_tree["compute"]["address"] = "${KB_SECRET}"
    loaded = manifests.load(write_manifest(tmp_path / "m.yaml", tiny_tree))
    assert "expanded" not in loaded.model_dump_json()


def test_load_variable_in_an_override_is_expanded(tiny_manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KB_PLACE", "/somewhere")
    assert manifests.load(tiny_manifest, ["root=${KB_PLACE}/x"]).root == "/somewhere/x"


def test_load_relative_source_starts_at_the_manifest_and_root_at_the_working_directory(
    tiny_tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there" / "weights").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    tiny_tree["root"], tiny_tree["model"]["source"] = "runs/x", "./weights"
    tiny_tree["corpus"]["source"] = "../text/*.jsonl"
    loaded = manifests.load(write_manifest(tmp_path / "there" / "m.yaml", tiny_tree))
    assert loaded.root == str(tmp_path / "here" / "runs" / "x")
    assert loaded.model.source == str(tmp_path / "there" / "weights")
    assert loaded.corpus.source == str(tmp_path / "text" / "*.jsonl")


def test_load_model_name_without_a_folder_is_a_name_on_the_hub(tiny_tree: Tree, tmp_path: Path) -> None:
    tiny_tree["model"]["source"] = "someone/model"
    path = write_manifest(tmp_path / "m.yaml", tiny_tree)
    assert manifests.load(path).model.source == "someone/model"
    (tmp_path / "someone" / "model").mkdir(parents=True)
    assert manifests.load(path).model.source == str(tmp_path / "someone" / "model")


def test_load_urls_are_not_made_into_folders(tiny_tree: Tree, tmp_path: Path) -> None:
    tiny_tree["root"], tiny_tree["corpus"]["source"] = "s3://bucket//a/./b/", "gs://bucket/*.parquet"
    loaded = manifests.load(write_manifest(tmp_path / "m.yaml", tiny_tree))
    assert (loaded.root, loaded.corpus.source) == ("s3://bucket/a/b", "gs://bucket/*.parquet")


def test_load_manifest_from_its_own_dump_is_the_same(tiny_manifest: Path, tmp_path: Path) -> None:
    loaded = manifests.load(tiny_manifest)
    again = manifests.load(write_manifest(tmp_path / "again.yaml", dict(manifests.canonical(loaded))))
    assert again == loaded


def test_identity_leaves_out_where_and_how_fast(tiny_manifest: Path) -> None:
    loaded = manifests.load(tiny_manifest)
    moved = manifests.load(tiny_manifest, ["root=/elsewhere", "compute.workers=7"])
    assert moved.identity() == loaded.identity()
    assert manifests.load(tiny_manifest, ["harvest.seed=1"]).identity() != loaded.identity()


def test_schema_accepts_what_load_accepts(tiny_tree: Tree) -> None:
    schema = Manifest.model_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(yaml.safe_load(QUICKSTART.read_text()), schema)
    jsonschema.validate(tiny_tree, schema)


def test_schema_survives_a_round_trip_of_the_values(tiny_manifest: Path) -> None:
    values = json.loads(manifests.load(tiny_manifest).model_dump_json())
    jsonschema.validate(values, Manifest.model_json_schema())
    assert Manifest.model_validate(values) == manifests.load(tiny_manifest)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("corpus", "contxt", 3), ("corpus", "context", "many"), ("harvest", "dtype", "float8"), ("harvest", "seed", -1)],
)
def test_schema_refuses_what_load_refuses(
    section: str, key: str, value: object, tiny_tree: Tree, tmp_path: Path
) -> None:
    tiny_tree[section][key] = value
    with pytest.raises(ManifestError):
        manifests.load(write_manifest(tmp_path / "m.yaml", tiny_tree))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(tiny_tree, Manifest.model_json_schema())


def test_schema_describes_every_section() -> None:
    definitions = Manifest.model_json_schema()["$defs"]
    assert all(definition.get("additionalProperties") is False for definition in definitions.values())
    assert {"Model", "Corpus", "Harvest", "Dictionary", "Train", "Compute"} <= definitions.keys()


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("corpus.contxt", "context"),
        ("harvest.hookpoints", "hook_points"),
        ("dictionaries.0.train.learning_rte", "learning_rate"),
        ("dictionaries.0.catalog.exmples", "examples"),
        ("compute.rank_thread", "rank_threads"),
    ],
)
def test_load_misspelt_key_names_the_nearest(typed: str, meant: str, tiny_manifest: Path) -> None:
    with pytest.raises(ManifestError, match=f"{typed}: unknown key; did you mean '{meant}'"):
        manifests.load(tiny_manifest, [f"{typed}=1"])


def test_load_several_mistakes_are_counted(tiny_manifest: Path) -> None:
    with pytest.raises(ManifestError, match=r"\(2 more\)"):
        manifests.load(tiny_manifest, ["corpus.context=x", "corpus.heldout=2", "compute.workers=0"])


def test_load_one_mistake_in_a_list_is_counted_once(tiny_manifest: Path) -> None:
    with pytest.raises(ManifestError) as caught:
        manifests.load(tiny_manifest, ["dictionaries.0.k=0"])
    assert "more)" not in str(caught.value)


def test_load_sweep_is_a_dictionary_for_every_combination(tiny_tree: Tree, tmp_path: Path) -> None:
    tiny_tree["dictionaries"][0]["sweep"] = {"k": [2, 4], "train.learning_rate": [1e-3, 0.5]}
    tiny_tree["dictionaries"].append({**tiny_tree["dictionaries"][0], "name": "other"})
    del tiny_tree["dictionaries"][1]["sweep"]
    loaded = manifests.load(write_manifest(tmp_path / "m.yaml", tiny_tree))
    assert [(each.name, each.k, each.train.learning_rate) for each in loaded.dictionaries] == [
        ("tiny-k2-learning_rate0.001", 2, 1e-3),
        ("tiny-k2-learning_rate0.5", 2, 0.5),
        ("tiny-k4-learning_rate0.001", 4, 1e-3),
        ("tiny-k4-learning_rate0.5", 4, 0.5),
        ("other", 4, 3e-3),
    ]
    # Nothing of a sweep is left: a dictionary of one is the dictionary that it would be by itself.
    by_itself = {**tiny_tree["dictionaries"][1], "name": "tiny-k2-learning_rate0.5", "k": 2}
    by_itself["train"] = {**by_itself["train"], "learning_rate": 0.5}
    tiny_tree["dictionaries"] = [by_itself]
    alone = manifests.load(write_manifest(tmp_path / "m.yaml", tiny_tree))
    assert alone.identity()["dictionaries"] == loaded.identity()["dictionaries"][1:2]


def test_load_override_reaches_into_a_sweep(tiny_tree: Tree, tmp_path: Path) -> None:
    tiny_tree["dictionaries"][0]["sweep"] = {"k": [2]}
    path = write_manifest(tmp_path / "m.yaml", tiny_tree)
    assert [each.k for each in manifests.load(path, ["dictionaries.0.sweep.k=[1, 3]"]).dictionaries] == [1, 3]
