"""What decides whether earlier output is used again."""

import json
import math
import operator
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from pydantic import BaseModel

from jobs import manifest as manifests
from jobs.fingerprint import differences, fingerprint, spec
from jobs.plan import instances
from jobs.sources import survey
from jobs.workspace import label
from schemas.compute import Compute
from schemas.manifest import Manifest
from schemas.records import canonical_json
from tests.support.fixtures import make_corpus, make_model, write_manifest

Tree = dict[str, Any]


def fingerprints(path: Path, *overrides: str) -> dict[str, str]:
    """What each stage's own parameters come to, its inputs left aside."""
    manifest = manifests.load(path, list(overrides))
    sources = survey(manifest)
    return {
        label(stage, dictionary): fingerprint(spec(stage, stage.params(manifest, dictionary, sources), {}))
        for stage, dictionary in instances(manifest)
    }


def changed(path: Path, *overrides: str) -> set[str]:
    """The stages, without the dictionary's name, whose fingerprint an override changes."""
    before, after = fingerprints(path), fingerprints(path, *overrides)
    return {name.split("/")[0] for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


FIRST = "dictionaries.0."

# Field -> another value, and the first stage that must see it.
IDENTITY: dict[str, tuple[str, str]] = {
    "model.dtype": ("bfloat16", "harvest"),
    "corpus.text_field": ("title", "tokenize"),
    "corpus.context": ("16", "tokenize"),
    "corpus.bos": ("never", "tokenize"),
    "corpus.eos": ("always", "tokenize"),
    "corpus.min_tokens": ("4", "tokenize"),
    "corpus.max_documents": ("30", "tokenize"),
    "corpus.heldout": ("0.3", "tokenize"),
    "harvest.hook_points": ("[gpt_neox.layers.1]", "harvest"),
    "harvest.tokens": ("4096", "harvest"),
    "harvest.dtype": ("bfloat16", "harvest"),
    "harvest.batch_tokens": ("256", "harvest"),
    "harvest.unit_rows": ("1024", "harvest"),
    "harvest.chunk_rows": ("128", "harvest"),
    "harvest.loader_memory": ("256MiB", "harvest"),
    "harvest.seed": ("1", "harvest"),
    FIRST + "name": ("other", "train"),
    FIRST + "hook_point": ("gpt_neox.layers.0.mlp:in", "train"),
    FIRST + "transcode.from": ("gpt_neox.layers.0", "train"),
    FIRST + "transcode.to": ("gpt_neox.layers.0", "train"),
    FIRST + "features": ("128", "train"),
    FIRST + "activation": ("batch_topk", "train"),
    FIRST + "k": ("5", "train"),
    FIRST + "tree.children": ("3", "train"),
    FIRST + "tree.coarse_k": ("1", "train"),
    FIRST + "tree.routed": ("3", "train"),
    FIRST + "tree.always": ("1", "train"),
    FIRST + "tree.sees": ("input", "train"),
    FIRST + "tree.coarse_weight": ("0.5", "train"),
    FIRST + "tree.rebalance": ("4096", "train"),
    FIRST + "train.tokens": ("4096", "train"),
    FIRST + "train.batch": ("128", "train"),
    FIRST + "train.learning_rate": ("0.001", "train"),
    FIRST + "train.warmup": ("0.1", "train"),
    FIRST + "train.decay": ("0.3", "train"),
    FIRST + "train.optimizer": ("adam", "train"),
    FIRST + "train.second_moment": ("full", "train"),
    FIRST + "train.weights": ("bfloat16", "train"),
    FIRST + "train.beta1": ("0.0", "train"),
    FIRST + "train.beta2": ("0.99", "train"),
    FIRST + "train.clip": ("0.5", "train"),
    FIRST + "train.aux_k": ("2", "train"),
    FIRST + "train.aux_weight": ("0.5", "train"),
    FIRST + "train.sparsity.weight": ("2.0", "train"),
    FIRST + "train.sparsity.warmup": ("0.1", "train"),
    FIRST + "train.sparsity.bandwidth": ("0.5", "train"),
    FIRST + "train.prefixes": ("[8]", "train"),
    FIRST + "train.dead_after": ("1024", "train"),
    FIRST + "train.resample": ("4096", "train"),
    FIRST + "train.seed": ("1", "train"),
    FIRST + "train.filter.skip_positions": ("1", "train"),
    FIRST + "train.filter.max_norm": ("10", "train"),
    FIRST + "evaluate.tokens": ("1024", "evaluate"),
    FIRST + "evaluate.baselines": ("[pca]", "evaluate"),
    FIRST + "catalog.tokens": ("5000", "catalog"),
    FIRST + "catalog.examples": ("4", "catalog"),
    FIRST + "catalog.window": ("5", "catalog"),
    FIRST + "catalog.report_features": ("5", "catalog"),
    FIRST + "export": ("[]", "export"),
}

# Of a manifest with a synthetic source: a table of its own, in `test_synthetic`.
SYNTHETIC = {"synthetic"}
# Judged by what is found there, not by what it is called; tests of their own below.
BY_CONTENT = {"model.source", "model.revision", "model.trust_remote_code", "corpus.source"}
# `expansion` is another way to write `features`, and `sweep` to write several dictionaries; the manifest's name only
# says who owns a root.
ELSEWHERE = {"name", "root", FIRST + "expansion", FIRST + "sweep"}

COMPUTE = {
    "pool": "ray",
    "address": "10.0.0.1:6379",
    "workers": "5",
    "threads": "3",
    "gpus": "1",
    "sharding.features": "2",
    "sharding.data": "2",
    "sharding.auto": "true",
    "zero.stage": "1",
    "zero.offload": "cpu",
    "accumulate": "2",
    "rank_threads": "3",
    "memory": "8GiB",
    "gpu_memory": "8GiB",
    "attempts": "7",
    "unit_seconds": "60",
    "rank_seconds": "60",
    "only": "[tiny]",
    "share_reads": "false",
    "checkpoint_seconds": "9",
    "lease_seconds": "30",
    "single_writer": "true",
    "deterministic": "false",
}


def leaves(section: type[BaseModel], at: str = "") -> Iterator[str]:
    """Every field of a manifest, lists counted as their first item."""
    for name, field in section.model_fields.items():
        kinds = [kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type)]
        (inner, *_) = [kind for kind in kinds if issubclass(kind, BaseModel)] or [None]
        if inner is None:
            yield at + (field.alias or name)
        else:
            listed = "0." if get_origin(field.annotation) is tuple else ""
            yield from leaves(inner, f"{at}{name}.{listed}")


def test_fields_of_the_manifest_are_all_in_these_tables() -> None:
    compute = {f"compute.{name}" for name in COMPUTE}
    assert set(leaves(Manifest)) == IDENTITY.keys() | BY_CONTENT | ELSEWHERE | SYNTHETIC | compute


@pytest.mark.parametrize("field", IDENTITY)
def test_fingerprint_of_an_identity_field_changes_with_it(field: str, tiny_tree: Tree, tmp_path: Path) -> None:
    value, stage = IDENTITY[field]
    if field == "corpus.text_field":
        folder = make_corpus(tmp_path / "corpus")
        for path in folder.iterdir():
            path.write_text(path.read_text().replace('{"text": ', '{"title": "a title for every document", "text": '))
        tiny_tree["corpus"]["source"] = str(folder)
    (dictionary,) = tiny_tree["dictionaries"]
    if field.startswith(FIRST + "train.sparsity"):
        dictionary["activation"] = "jumprelu"
    if field.startswith(FIRST + "tree"):
        dictionary["tree"] = {"children": 7}
        dictionary["train"]["resample"] = 8192
    if field.startswith(FIRST + "transcode"):
        tiny_tree["harvest"]["hook_points"].append("gpt_neox.layers.0")
        dictionary["transcode"] = {"from": "gpt_neox.layers.0.mlp:in", "to": dictionary.pop("hook_point")}
    path = write_manifest(tmp_path / "m.yaml", tiny_tree)
    assert stage in changed(path, f"{field}={value}")


@pytest.mark.parametrize("field", COMPUTE)
def test_fingerprint_does_not_know_compute(field: str, tiny_tree: Tree, tmp_path: Path) -> None:
    tiny_tree["compute"] = {"pool": "ray"} if field != "pool" else {"pool": "inline"}
    if field.startswith(("zero", "accumulate")):
        tiny_tree["dictionaries"][0]["train"]["optimizer"] = "adam"
    if field == "zero.offload":
        tiny_tree["compute"]["zero"] = {"stage": 2}
    path = write_manifest(tmp_path / "m.yaml", tiny_tree)
    override = f"compute.{field}={COMPUTE[field]}"
    value = operator.attrgetter(field)
    default = value(manifests.load(path).compute)
    assert value(manifests.load(path, [override]).compute) != default, "the table must name another value"
    assert changed(path, override) == set()


def test_fingerprint_table_of_compute_is_whole() -> None:
    assert {field.partition(".")[0] for field in COMPUTE} == Compute.model_fields.keys()


def test_fingerprint_of_expansion_is_that_of_the_features_it_means(tiny_tree: Tree, tmp_path: Path) -> None:
    before = fingerprints(write_manifest(tmp_path / "a.yaml", tiny_tree))
    del tiny_tree["dictionaries"][0]["features"]
    tiny_tree["dictionaries"][0]["expansion"] = 4
    assert fingerprints(write_manifest(tmp_path / "b.yaml", tiny_tree)) == before


def test_fingerprint_of_what_a_tree_takes_by_itself_is_that_of_what_it_means(tiny_tree: Tree, tmp_path: Path) -> None:
    tiny_tree["dictionaries"][0]["tree"] = {"children": 7}
    before = fingerprints(write_manifest(tmp_path / "a.yaml", tiny_tree))
    tiny_tree["dictionaries"][0]["tree"] |= {"coarse_k": 2, "routed": 2}
    assert fingerprints(write_manifest(tmp_path / "b.yaml", tiny_tree)) == before


def test_fingerprint_of_a_moved_model_corpus_and_root_stays(tiny_tree: Tree, tmp_path: Path) -> None:
    before = fingerprints(write_manifest(tmp_path / "m.yaml", tiny_tree))
    for section in ("model", "corpus"):
        source = Path(tiny_tree[section]["source"])
        tiny_tree[section]["source"] = str(shutil.copytree(source, tmp_path / "moved" / source.name))
    tiny_tree["root"] = str(tmp_path / "another" / "root")
    assert fingerprints(write_manifest(tmp_path / "m.yaml", tiny_tree)) == before


def test_fingerprint_of_a_renamed_corpus_folder_stays(tiny_tree: Tree, tmp_path: Path) -> None:
    before = fingerprints(write_manifest(tmp_path / "m.yaml", tiny_tree))
    tiny_tree["corpus"]["source"] = str(shutil.copytree(tiny_tree["corpus"]["source"], tmp_path / "renamed"))
    assert fingerprints(write_manifest(tmp_path / "m.yaml", tiny_tree)) == before


def test_fingerprint_of_a_renamed_model_folder_stays(tiny_tree: Tree, tmp_path: Path) -> None:
    before = fingerprints(write_manifest(tmp_path / "m.yaml", tiny_tree))
    tiny_tree["model"]["source"] = str(shutil.copytree(tiny_tree["model"]["source"], tmp_path / "renamed"))
    assert fingerprints(write_manifest(tmp_path / "m.yaml", tiny_tree)) == before


def test_fingerprint_of_other_weights_changes_what_saw_the_model(tiny_tree: Tree, tmp_path: Path) -> None:
    before = fingerprints(write_manifest(tmp_path / "m.yaml", tiny_tree))
    tiny_tree["model"]["source"] = str(make_model(tmp_path / "model", seed=1))
    after = fingerprints(write_manifest(tmp_path / "m.yaml", tiny_tree))
    assert after["tokenize"] == before["tokenize"], "the tokenizer is the same"
    assert after["harvest"] != before["harvest"]


def test_fingerprint_of_another_tokenizer_changes_tokenize(tiny_tree: Tree, tmp_path: Path) -> None:
    before = fingerprints(write_manifest(tmp_path / "m.yaml", tiny_tree))
    folder = shutil.copytree(tiny_tree["model"]["source"], tmp_path / "model")
    described = json.loads((folder / "tokenizer.json").read_text())
    described["pre_tokenizer"]["add_prefix_space"] = True
    (folder / "tokenizer.json").write_text(json.dumps(described))
    tiny_tree["model"]["source"] = str(folder)
    after = fingerprints(write_manifest(tmp_path / "m.yaml", tiny_tree))
    assert after["tokenize"] != before["tokenize"]


@pytest.mark.parametrize("trusted", [False, True])
def test_fingerprint_of_the_models_own_code_counts_if_it_is_run(trusted: bool, tiny_tree: Tree, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_tree["model"]["source"], tmp_path / "model")
    tiny_tree["model"] |= {"source": str(folder), "trust_remote_code": trusted}
    path = write_manifest(tmp_path / "m.yaml", tiny_tree)
    (folder / "modeling.py").write_text("VERSION = 1\n")
    before = fingerprints(path)["harvest"]
    (folder / "modeling.py").write_text("VERSION = 2\n")
    assert (fingerprints(path)["harvest"] != before) is trusted


@pytest.mark.parametrize("change", ["a document more", "a file more", "one letter"])
def test_fingerprint_of_another_corpus_changes_tokenize(change: str, tiny_tree: Tree, tmp_path: Path) -> None:
    folder = make_corpus(tmp_path / "corpus")
    tiny_tree["corpus"]["source"] = str(folder)
    path = write_manifest(tmp_path / "m.yaml", tiny_tree)
    before = fingerprints(path)
    part = folder / "part-0.jsonl"
    if change == "a document more":
        part.write_text(part.read_text() + '{"text": "one more document than there was"}\n')
    elif change == "a file more":
        (folder / "part-9.jsonl").write_text('{"text": "one more document than there was"}\n')
    else:
        part.write_text(part.read_text().replace("cat", "cut", 1))
    after = fingerprints(path)
    assert {name for name in before if before[name] != after[name]} == {"tokenize"}


def test_fingerprint_changes_with_an_inputs_digest_and_the_stages_version(tiny_manifest: Path) -> None:
    manifest = manifests.load(tiny_manifest)
    stage, dictionary = instances(manifest)[1]
    params = stage.params(manifest, dictionary, survey(manifest))
    plain = spec(stage, params, {"tokenize": "a"})
    assert fingerprint(plain) != fingerprint(spec(stage, params, {"tokenize": "b"}))
    assert fingerprint(plain) != fingerprint(plain | {"version": stage.version + 1})
    assert fingerprint(plain) == fingerprint(dict(reversed(plain.items())))


@pytest.mark.parametrize(
    "value", [{1, 2}, frozenset(), object(), len, b"bytes", 1j, Path("x")], ids=lambda value: type(value).__name__
)
def test_canonical_json_of_what_has_no_form_is_refused(value: object) -> None:
    with pytest.raises(TypeError):
        canonical_json({"deep": [value]})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_canonical_json_of_no_finite_number_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="float"):
        canonical_json({"deep": [value]})


def test_canonical_json_does_not_depend_on_the_order_of_keys() -> None:
    assert canonical_json({"b": 1, "a": [2.0, "ü"]}) == '{"a":[2.0,"ü"],"b":1}'.encode()


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ({"a": 1}, {"a": 1}, []),
        ({"a": {"b": [1, 2]}}, {"a": {"b": [1, 3]}}, ["a.b.1: 2 -> 3"]),
        ({"a": [1]}, {"a": [1, 2]}, ["a: [1] -> [1, 2]"]),
        ({"a": 1}, {"b": 2}, ["a: 1 -> None", "b: None -> 2"]),
        ({"a": None}, {"a": {"b": 1}}, ["a: None -> {'b': 1}"]),
    ],
)
def test_differences_name_every_field_that_differs(old: object, new: object, expected: list[str]) -> None:
    assert list(differences(old, new)) == expected


def test_differences_of_long_values_are_shortened() -> None:
    (line,) = differences({"a": "x" * 500}, {"a": "y" * 500})
    assert len(line) < 100
