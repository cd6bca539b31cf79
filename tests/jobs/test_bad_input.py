"""Every mistake of a user's is one line, exit code 2, and nothing written."""

import gzip
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import zstandard

from cluster.storage import objects
from tests.support.command import Result, invoke, snapshot
from tests.support.fixtures import HOOK_POINT, documents, write_manifest

Tree = dict[str, Any]
Change = Callable[[Tree, Path], None]


def assert_refused(result: Result, *fragments: str, code: int = 2) -> None:
    """One line on stderr, of the form that the contract asks for."""
    assert result.code == code, result
    assert result.err.endswith("\n"), result.err
    (line,) = result.err.splitlines()
    assert line.startswith("kilobasis: "), line
    assert "Traceback" not in result.out + result.err
    missing = [fragment for fragment in fragments if fragment not in line]
    assert not missing, f"{missing} not in: {line}"


def refused(folder: Path, tree: Tree, change: Change, *fragments: str, command: str = "plan") -> None:
    """Apply a change to a manifest that works, and see it refused with nothing written."""
    change(tree, folder)
    path = write_manifest(folder / "manifest.yaml", tree)
    before = snapshot(folder)
    result = invoke(command, path)
    assert_refused(result, *fragments, " -> ")
    assert snapshot(folder) == before


def at(dotted: str, value: Any) -> Change:
    """Set one field."""

    def change(tree: Any, _folder: Path) -> None:
        *parents, last = dotted.split(".")
        for key in parents:
            tree = tree[int(key)] if isinstance(tree, list) else tree.setdefault(key, {})
        tree[int(last) if isinstance(tree, list) else last] = value

    return change


def without(dotted: str) -> Change:
    """Leave out one field."""

    def change(tree: Any, _folder: Path) -> None:
        *parents, last = dotted.split(".")
        for key in parents:
            tree = tree[int(key)] if isinstance(tree, list) else tree[key]
        del tree[last]

    return change


def corpus(name: str, body: bytes) -> Change:
    """A corpus of one file."""

    def change(tree: Tree, folder: Path) -> None:
        (folder / "texts").mkdir()
        (folder / "texts" / name).write_bytes(body)
        tree["corpus"]["source"] = str(folder / "texts")

    return change


def model(alter: Callable[[Path], object]) -> Change:
    """A copy of the model with something wrong in it."""

    def change(tree: Tree, folder: Path) -> None:
        shutil.copytree(tree["model"]["source"], folder / "model")
        alter(folder / "model")
        tree["model"]["source"] = str(folder / "model")

    return change


def config(**fields: Any) -> Change:
    """A model with other fields in its config.json."""

    def alter(folder: Path) -> None:
        known = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(known | fields))

    return model(alter)


def both(*changes: Change) -> Change:
    """One change after another."""

    def change(tree: Tree, folder: Path) -> None:
        for each in changes:
            each(tree, folder)

    return change


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def lines(*records: object, count: int = 40) -> bytes:
    """JSONL of good documents, with more lines behind."""
    good = [json.dumps({"text": text}) for text in documents(count)]
    return "\n".join([*good[:3], *map(str, records), *good[3:]]).encode() + b"\n"


def parquet(**columns: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def damaged(body: bytes, start: int, count: int) -> bytes:
    """The same with `count` bytes inverted."""
    return body[:start] + bytes(255 - byte for byte in body[start : start + count]) + body[start + count :]


PARQUET = parquet(text=documents(60))
FIRST = "dictionaries.0."

FIELDS: dict[str, tuple[Change, tuple[str, ...]]] = {
    # Keys
    "unknown_section": (at("harvset", {}), ("harvset: unknown key", "did you mean 'harvest'?")),
    "unknown_for_a_missing_section": (
        both(without("harvest"), at("harvset", {})),
        ("harvset: unknown key", "did you mean 'harvest'?"),
    ),
    "unknown_key": (at("compute.worker", 2), ("compute.worker: unknown key", "did you mean 'workers'?")),
    "unknown_key_in_a_list": (at(FIRST + "kk", 2), ("dictionaries.0.kk: unknown key", "did you mean 'k'?")),
    "unknown_key_deep_down": (
        at(FIRST + "train.filter.max_nrm", 2),
        ("dictionaries.0.train.filter.max_nrm: unknown key", "did you mean 'max_norm'?"),
    ),
    "unknown_key_like_nothing": (
        at("model.qqq", 2),
        ("model.qqq: unknown key; known here: dtype, revision, source, trust_remote_code",),
    ),
    "key_that_is_a_number": (at("corpus", {1: 2, "source": "x"}), ("corpus",)),
    "missing_section": (without("harvest"), ("harvest: this field is required",)),
    "missing_field": (without(FIRST + "train.tokens"), ("dictionaries.0.train.tokens: this field is required",)),
    # Types
    "text_for_a_number": (at("corpus.context", "many"), ("corpus.context", "integer", "found 'many'")),
    "list_for_a_number": (at("corpus.context", [1, 2]), ("corpus.context", "integer", "found a list of 2")),
    "truth_for_a_number": (at(FIRST + "k", True), ("dictionaries.0.k", "found true")),
    "text_for_a_list": (at("harvest.hook_points", HOOK_POINT), ("harvest.hook_points", "valid list", HOOK_POINT)),
    "list_for_a_section": (at("corpus", [1]), ("corpus: expected a mapping", "found a list of 1")),
    "null_for_a_section": (at("model", None), ("model: expected a mapping", "found 'None'")),
    "number_for_text": (at("name", 5), ("name", "string", "found '5'")),
    "fraction_for_a_count": (at("compute.workers", 1.5), ("compute.workers", "integer", "found '1.5'")),
    "unknown_choice": (at("harvest.dtype", "float8"), ("harvest.dtype", "'float32'", "'bfloat16'", "found 'float8'")),
    # Values
    "empty_list": (at("dictionaries", []), ("dictionaries", "at least 1")),
    "name_with_a_slash": (at("name", "a/b"), ("name", "'a/b' is no name")),
    "name_that_climbs": (at(FIRST + "name", ".."), ("dictionaries.0.name", "'..' is no name")),
    "negative_count": (at(FIRST + "k", -1), ("dictionaries.0.k", "greater than or equal to 1", "found '-1'")),
    "count_that_is_no_count": (at("harvest.tokens", "1e5"), ("harvest.tokens", "'1e5' is no count", "2M")),
    "count_beyond_all": (at("harvest.tokens", "9" * 400), ("harvest.tokens", "the largest number")),
    "number_beyond_all": (at(FIRST + "features", 10**400), ("dictionaries.0.features", "a number of 1329 bits")),
    "size_that_is_no_size": (at("compute.memory", "lots"), ("compute.memory", "'lots' is no size", "512MiB")),
    "seed_beyond_63_bits": (at("harvest.seed", 2**63), ("harvest.seed", "less than")),
    "infinite_rate": (at(FIRST + "train.learning_rate", float("inf")), ("learning_rate", "finite", "found 'inf'")),
    "rate_that_is_no_number": (at(FIRST + "train.learning_rate", float("nan")), ("learning_rate", "found 'nan'")),
    "share_of_one": (at("corpus.heldout", 1.0), ("corpus.heldout", "less than 1", "found '1.0'")),
    "hook_point_twice": (
        at("harvest.hook_points", [HOOK_POINT, HOOK_POINT]),
        ("harvest.hook_points", HOOK_POINT, "2 times, expected once"),
    ),
    "size_twice": (at(FIRST + "expansion", 4), ("dictionaries.0", "either features or expansion")),
    "size_not_at_all": (without(FIRST + "features"), ("dictionaries.0", "either features or expansion")),
    "warmup_and_decay_overlap": (
        both(at(FIRST + "train.warmup", 0.6), at(FIRST + "train.decay", 0.6)),
        ("dictionaries.0.train", "0.6"),
    ),
    # Fields that do not fit each other
    "k_above_features": (at(FIRST + "k", 65), ("dictionaries.0", "k 65 exceeds features 64")),
    "k_above_expansion": (
        both(without(FIRST + "features"), at(FIRST + "expansion", 2), at(FIRST + "k", 33)),
        ("k 33 exceeds its 32 features", "set k to 32 or less"),
    ),
    "batch_above_tokens": (at(FIRST + "train.batch", 10**5), ("batch 100000 is larger than tokens 8192",)),
    "batch_over_ranks": (
        both(at("compute.sharding.data", 3), at("compute.pool", "ray")),
        ("dictionaries.0.train.batch 256 is not divisible by compute.sharding.data 3",),
    ),
    "ranks_of_the_inline_pool": (
        at("compute.sharding.data", 2),
        ("compute.sharding has 2 ranks (1 x 2)", "inline pool has 1"),
    ),
    "features_over_ranks": (
        both(at("compute.sharding.features", 3), at("compute.pool", "ray")),
        ("64 features cannot be shared evenly by compute.sharding.features 3", "set features to 63 or 66"),
    ),
    "dense_adam_over_features": (
        both(at("compute.sharding.features", 2), at("compute.pool", "ray"), at(FIRST + "train.optimizer", "adam")),
        ("optimizer adam is dense", "needs row_adam"),
    ),
    "zero_of_row_adam": (
        at("compute.zero.stage", 2),
        ("row_adam has no dense gradient", "found compute.zero.stage 2, expected 0", "compute.sharding.features"),
    ),
    "offload_without_zero": (
        both(at("compute.zero.offload", "cpu"), at(FIRST + "train.optimizer", "adam")),
        ("offload cpu needs stage 1, 2 or 3; found 0",),
    ),
    "accumulation_of_row_adam": (
        at("compute.accumulate", 2),
        ("row_adam has no gradient to add up", "found compute.accumulate 2, expected 1", "lower train.batch"),
    ),
    "accumulation_that_does_not_divide": (
        both(at("compute.accumulate", 3), at(FIRST + "train.optimizer", "adam")),
        ("train.batch 256 is not divisible by compute.sharding.data times compute.accumulate, 3", "255 or 258"),
    ),
    "bfloat16_without_a_float32_copy": (
        both(at(FIRST + "train.weights", "bfloat16"), at(FIRST + "train.optimizer", "adam")),
        ("train.weights bfloat16 with adam", "found compute.zero.stage 0, expected 2 or 3"),
    ),
    "row_moments_of_adam": (
        both(at(FIRST + "train.optimizer", "adam"), at(FIRST + "train.second_moment", "row")),
        ("second_moment row is row_adam's",),
    ),
    "sparsity_of_topk": (at(FIRST + "train.sparsity", 2.0), ("train.sparsity does nothing for topk", "leave it out")),
    "relu_without_sparsity": (at(FIRST + "activation", "relu"), ("relu needs train.sparsity",)),
    "bandwidth_of_relu": (
        both(at(FIRST + "activation", "relu"), at(FIRST + "train.sparsity", {"weight": 1.0, "bandwidth": 0.1})),
        ("bandwidth is jumprelu's", "found activation relu"),
    ),
    "thresholds_of_dense_adam": (
        both(at(FIRST + "activation", "batch_topk"), at(FIRST + "train.optimizer", "adam")),
        ("activation batch_topk needs train.optimizer row_adam",),
    ),
    "resampling_of_dense_adam": (
        both(at(FIRST + "train.resample", 4096), at(FIRST + "train.optimizer", "adam")),
        ("resample needs row_adam", "found optimizer adam"),
    ),
    "tree_without_children": (at(FIRST + "tree", {}), ("tree.children", "required")),
    "tree_that_is_not_topk": (
        both(at(FIRST + "tree", {"children": 7}), at(FIRST + "activation", "batch_topk")),
        ("tree needs activation topk, found batch_topk",),
    ),
    "tree_of_dense_adam": (
        both(at(FIRST + "tree", {"children": 7}), at(FIRST + "train.optimizer", "adam")),
        ("tree needs train.optimizer row_adam, found adam",),
    ),
    "tree_that_transcodes": (
        both(
            at(FIRST + "tree", {"children": 7}),
            without(FIRST + "hook_point"),
            at(FIRST + "transcode", {"from": "gpt_neox.layers.0.mlp:in", "to": HOOK_POINT}),
        ),
        ("tree needs hook_point",),
    ),
    "tree_with_prefixes": (
        both(at(FIRST + "tree", {"children": 7}), at(FIRST + "train.prefixes", [8])),
        ("train.prefixes does nothing for a tree", "tree.coarse_weight"),
    ),
    "resampling_of_relu": (
        both(
            at(FIRST + "activation", "relu"),
            both(at(FIRST + "train.sparsity", {"weight": 1.0}), at(FIRST + "train.resample", 4096)),
        ),
        ("train.resample gives features a bias of 0", "leave it out"),
    ),
    "tree_with_an_auxiliary_loss": (
        both(at(FIRST + "tree", {"children": 7}), at(FIRST + "train.aux_k", 8)),
        ("train.aux_k 8", "set train.resample"),
    ),
    "tree_whose_empty_places_stay_empty": (
        both(at(FIRST + "tree", {"children": 7, "rebalance": 4096}), at(FIRST + "train.aux_k", 0)),
        ("tree.rebalance 4096 leaves places empty", "train.resample"),
    ),
    "tree_of_one_active_feature": (
        both(at(FIRST + "tree", {"children": 7}), at(FIRST + "k", 1)),
        ("a tree needs k of 2 or more, found 1",),
    ),
    "tree_whose_parents_take_all_of_k": (
        at(FIRST + "tree", {"children": 7, "coarse_k": 4}),
        ("tree.coarse_k 4 leaves no child of k 4", "below 4"),
    ),
    "tree_that_routes_fewer_than_fire": (
        at(FIRST + "tree", {"children": 7, "coarse_k": 3, "routed": 2}),
        ("tree.routed 2 is less than coarse_k 3",),
    ),
    "tree_of_a_part_of_a_subtree": (
        at(FIRST + "tree", {"children": 6}),
        ("64 features are not whole subtrees", "63 or 70"),
    ),
    "tree_with_too_few_parents": (
        at(FIRST + "tree", {"children": 31, "coarse_k": 3}),
        ("tree.coarse_k 3 exceeds its 2 parents",),
    ),
    "tree_of_a_part_of_a_subtree_by_expansion": (
        both(at(FIRST + "tree", {"children": 6}), without(FIRST + "features"), at(FIRST + "expansion", 4)),
        ("not whole subtrees of a parent and 6 children",),
    ),
    "tree_that_cannot_be_shared": (
        both(at(FIRST + "tree", {"children": 31}), at("compute", {"pool": "ray", "sharding": {"features": 4}})),
        ("64 features in subtrees of 32 cannot be shared evenly", "128"),
    ),
    "transcoder_and_hook_point": (
        at(FIRST + "transcode", {"from": HOOK_POINT, "to": "gpt_neox.layers.0.mlp:in"}),
        ("give either hook_point or transcode",),
    ),
    "transcoder_of_one_place": (
        both(without(FIRST + "hook_point"), at(FIRST + "transcode", {"from": HOOK_POINT, "to": HOOK_POINT})),
        ("from and to are both", "give hook_point instead"),
    ),
    "transcoder_of_nothing_harvested": (
        both(without(FIRST + "hook_point"), at(FIRST + "transcode", {"from": HOOK_POINT, "to": "gpt_neox.layers.0"})),
        ("dictionaries.0.transcode.to 'gpt_neox.layers.0' is not harvested",),
    ),
    "transcoder_that_saelens_lacks": (
        both(
            without(FIRST + "hook_point"),
            at(FIRST + "transcode", {"from": "gpt_neox.layers.0.mlp:in", "to": HOOK_POINT}),
        ),
        ("SAELens has no transcoder with activation topk", "set activation to batch_topk, or export to []"),
    ),
    "prefixes_that_descend": (at(FIRST + "train.prefixes", [32, 16]), ("[32, 16]", "in ascending order")),
    "prefix_of_everything": (at(FIRST + "train.prefixes", [16, 64]), ("prefixes has 64", "less than features 64")),
    "prefix_above_an_expansion": (
        both(without(FIRST + "features"), at(FIRST + "expansion", 2), at(FIRST + "train.prefixes", [40])),
        ("prefixes has 40", "32 features"),
    ),
    "activation_unknown": (at(FIRST + "activation", "gated"), ("activation", "'topk', 'batch_topk', 'jumprelu'")),
    "units_over_chunks": (
        both(at("harvest.unit_rows", 100), at("harvest.chunk_rows", 32)),
        ("harvest", "unit_rows 100 is not a multiple of chunk_rows 32", "96 or 128"),
    ),
    "chunks_above_units": (
        both(at("harvest.unit_rows", 16), at("harvest.chunk_rows", 32)),
        ("unit_rows 16 is not a multiple of chunk_rows 32", "32"),
    ),
    "loader_below_two_slabs": (
        both(at("harvest.unit_rows", 64), at("harvest.chunk_rows", 32), at("harvest.loader_memory", "1KB")),
        ("2 slabs", "loader_memory 1000", "raise harvest.unit_rows to"),
    ),
    "dictionary_of_nothing_harvested": (
        at(FIRST + "hook_point", "gpt_neox.layers.0"),
        ("dictionaries.0.hook_point 'gpt_neox.layers.0' is not harvested", HOOK_POINT),
    ),
    "context_above_the_model": (at("corpus.context", 64), ("corpus.context is 64", "at most 32")),
    "filter_above_context": (at(FIRST + "train.filter.skip_positions", 32), ("skip_positions 32", "set it below 32")),
    "code_without_a_pin": (
        at("model", {"source": "nobody/nothing", "trust_remote_code": True}),
        ("model", "pin model.revision"),
    ),
    # Hook points
    "hook_point_of_nothing": (
        at("harvest.hook_points.1", "gpt_neox.layer.1"),
        ("'gpt_neox.layer.1' matches no module", "nearest: gpt_neox.layers.1"),
    ),
    "hook_point_empty": (at("harvest.hook_points.1", ":in"), ("':in' matches no module", "nearest: gpt_neox")),
    "hook_point_with_a_structure": (
        at("harvest.hook_points.1", "gpt_neox"),
        ("'gpt_neox'", "BaseModelOutputWithPast", "expected floats of shape (batch, position, width)"),
    ),
    "hook_point_with_token_ids": (
        at("harvest.hook_points.1", "gpt_neox.embed_in:in"),
        ("'gpt_neox.embed_in:in'", "torch.int64", "expected floats of shape (batch, position, width)"),
    ),
    "hook_point_without_the_batch": (
        at("harvest.hook_points.1", "gpt_neox.rotary_emb"),
        ("'gpt_neox.rotary_emb'", "expected (batch, position, width)"),
    ),
    "hook_point_never_reached": (
        at("harvest.hook_points.1", "gpt_neox.layers"),
        ("'gpt_neox.layers' was not reached",),
    ),
    # The model
    "model_path_missing": (at("model.source", "/nowhere/model"), ("model.source /nowhere/model: no folder is there",)),
    "model_name_unknown": (at("model.source", "nobody/nothing"), ("model.source nobody/nothing", "hub")),
    "model_home_unknown": (at("model.source", "~nobody-here/m"), ("model.source '~nobody-here/m' is no path",)),
    "model_blank": (at("model.source", "  "), ("model.source", "it is empty")),
    "model_null_character": (at("model.source", "./a\0b"), ("model.source", "null character")),
    "model_without_config": (model(lambda folder: (folder / "config.json").unlink()), ("model.source", "config.json")),
    "model_config_damaged": (
        model(lambda folder: (folder / "config.json").write_text("{")),
        ("model.source", "config.json cannot be used"),
    ),
    "model_config_wrong_type": (config(hidden_size="abc"), ("model.source", "'hidden_size' expected int")),
    "model_config_by_zero": (config(num_attention_heads=0), ("model.source", "config.json cannot be used")),
    "model_config_negative": (config(hidden_size=-16), ("model.source", "transformers cannot build it")),
    "model_type_unknown": (config(model_type="zork"), ("model.source", "zork")),
    "model_without_weights": (
        model(lambda folder: (folder / "model.safetensors").unlink()),
        ("model.source", "no *.safetensors"),
    ),
    "model_weights_cut_short": (
        model(lambda folder: os.truncate(folder / "model.safetensors", 20_000)),
        ("model.source", "model.safetensors is damaged"),
    ),
    "model_weights_of_another_shape": (
        config(hidden_size=32),
        ("model.source", "model.safetensors has gpt_neox", "of shape [", "config.json makes it ["),
    ),
    "model_without_tokenizer": (model(without_tokenizer), ("model.source", "holds no tokenizer")),
    "model_tokenizer_damaged": (
        model(lambda folder: (folder / "tokenizer.json").write_text("{}")),
        ("the tokenizer of", "cannot be loaded"),
    ),
    # The corpus
    "corpus_missing": (at("corpus.source", "/nowhere/text"), ("corpus.source /nowhere/text matches no file",)),
    "corpus_glob_of_nothing": (
        at("corpus.source", "/nowhere/*.txt"),
        ("corpus.source /nowhere/*.txt matches no file",),
    ),
    "corpus_blank": (at("corpus.source", ""), ("corpus.source", "it is empty")),
    "corpus_of_no_known_scheme": (at("corpus.source", "gopher://x/y"), ("gopher", "cannot be opened")),
    "corpus_folder_empty": (
        lambda tree, folder: tree["corpus"].update(source=str(folder / "none")) or (folder / "none").mkdir(),
        ("corpus.source", "matches no file"),
    ),
    "corpus_file_empty": (corpus("a.txt", b""), ("corpus.source", "has no text")),
    "corpus_only_blanks": (corpus("a.txt", b" \n\t\n"), ("corpus.source", "has no text")),
    "corpus_too_short": (corpus("a.txt", b"hi"), ("corpus.source", "corpus.min_tokens 8")),
    "corpus_kind_unknown": (corpus("a.bin", b"abc"), ("a.bin", "no known kind", ".jsonl", ".parquet")),
    "corpus_latin_1": (corpus("a.txt", b"caf\xe9 au lait " * 9), ("a.txt is not UTF-8", "byte 3")),
    "corpus_utf_16": (corpus("a.txt", ("hello " * 9).encode("utf-16")), ("a.txt is not UTF-8", "byte 0")),
    "corpus_latin_1_in_a_line": (corpus("a.jsonl", b'{"text": "caf\xe9"}\n'), ("a.jsonl", "is not UTF-8")),
    "corpus_line_not_json": (corpus("a.jsonl", lines('{"text": "abc')), ("a.jsonl line 4 is not JSON",)),
    "corpus_line_too_deep": (corpus("a.jsonl", lines("[" * 100_000)), ("a.jsonl line 4 is not JSON",)),
    "corpus_line_without_field": (
        corpus("a.jsonl", lines('{"body": "abc"}')),
        ("a.jsonl line 4 has no text under 'text', it has ['body']", "set corpus.text_field"),
    ),
    "corpus_line_of_a_list": (corpus("a.jsonl", lines("[1]")), ("a.jsonl line 4 has no text under 'text'", "list")),
    "corpus_line_with_null": (corpus("a.jsonl", lines('{"text": null}')), ("a.jsonl line 4 has no text",)),
    "corpus_line_of_half_a_character": (
        corpus("a.jsonl", lines(r'{"text": "\ud800"}')),
        ("a.jsonl line 4 holds half a surrogate pair",),
    ),
    "corpus_field_unknown": (at("corpus.text_field", "body"), ("line 1 has no text under 'body', it has ['text']",)),
    "gzip_of_something_else": (corpus("a.jsonl.gz", b"hello" * 50), ("a.jsonl.gz is damaged",)),
    "gzip_cut_short": (corpus("a.jsonl.gz", gzip.compress(lines(count=10))[:-9]), ("a.jsonl.gz is damaged",)),
    "gzip_flipped": (corpus("a.txt.gz", gzip.compress(lines())[:10] + b"\xff" * 99), ("a.txt.gz is damaged",)),
    "gzip_wrong_sum": (
        corpus("a.txt.gz", damaged(gzip.compress(lines()), len(gzip.compress(lines())) - 8, 4)),
        ("a.txt.gz is damaged",),
    ),
    "zstd_of_something_else": (corpus("a.jsonl.zst", b"hello" * 50), ("a.jsonl.zst is damaged",)),
    "zstd_cut_short": (
        corpus("a.txt.zst", zstandard.compress(lines())[:-3]),
        ("a.txt.zst is damaged", "ends inside a zstd frame"),
    ),
    "parquet_of_something_else": (corpus("a.parquet", b"hello" * 50), ("a.parquet is damaged",)),
    "parquet_cut_short": (corpus("a.parquet", PARQUET[: len(PARQUET) // 2]), ("a.parquet is damaged",)),
    "parquet_pages_damaged": (corpus("a.parquet", damaged(PARQUET, 40, 400)), ("a.parquet is damaged",)),
    "parquet_without_column": (
        corpus("a.parquet", parquet(body=["a"])),
        ("a.parquet has no column 'text', it has ['body']", "set corpus.text_field"),
    ),
    "parquet_column_of_numbers": (
        corpus("a.parquet", parquet(text=[1])),
        ("a.parquet column 'text' holds int64, expected string",),
    ),
    # The root
    "root_empty": (at("root", ""), ("root", "it is empty")),
    "root_null_character": (at("root", "a\0b"), ("root", "null character")),
    "root_home_unknown": (at("root", "~nobody-here/x"), ("root '~nobody-here/x' is no path",)),
    "root_name_too_long": (at("root", "x" * 300), ("root", "File name too long")),
    "root_below_a_file": (
        lambda tree, folder: tree.update(root=str(folder / "file" / "root")) or (folder / "file").write_text("x"),
        ("root", "cannot be a folder", "file is a file", "choose another root"),
    ),
    "root_is_a_file": (
        lambda tree, folder: tree.update(root=str(folder / "file")) or (folder / "file").write_text("x"),
        ("root", "cannot be a folder", "file is a file"),
    ),
    "root_of_no_known_scheme": (at("root", "gopher://x/y"), ("gopher", "cannot be opened")),
    "root_that_climbs": (at("root", "s3://bucket/../x"), ("climbs with '..'",)),
    "root_inside_the_corpus": (
        both(corpus("a.jsonl", lines()), lambda tree, folder: tree.update(root=str(folder / "texts" / "runs" / "x"))),
        ("root", "lies inside corpus.source", "choose another root"),
    ),
    # The machine
    "memory_that_cannot_fit": (
        at("compute.memory", "1GiB"),
        ("needs 1.6 GiB of memory", "there are 1.0 GiB", "set compute.workers to 1"),
    ),
    "dictionary_that_cannot_fit": (
        at(FIRST + "features", 10**12),
        ("train/tiny needs", "TiB of memory", "set dictionaries.0.features to "),
    ),
    # Secrets and variables
    "password_in_the_root": (at("root", "s3://me:pass@bucket/x"), ("root holds a credential",)),
    "key_in_the_corpus": (at("corpus.source", "s3://AKIAABCDEFGHIJKLMNOP/x"), ("corpus.source holds a credential",)),
    "signature_in_the_corpus": (
        at("corpus.source", "https://host/x.txt?X-Amz-Signature=abc"),
        ("corpus.source holds a credential",),
    ),
    "variable_unset": (
        at("root", "${KB_NOT_SET}/x"),
        ("root uses ${KB_NOT_SET}, which is not set", "export KB_NOT_SET"),
    ),
    "sweep_of_nothing": (at("dictionaries.0.sweep", {}), ("item 0, sweep is {}", "expected fields with a list")),
    "sweep_number": (at("dictionaries.0.sweep", 3), ("item 0, sweep is 3", "expected fields with a list")),
    "sweep_without_list": (at("dictionaries.0.sweep", {"k": 4}), ("item 0, sweep: k is 4", "a list of values")),
    "sweep_empty_list": (at("dictionaries.0.sweep", {"k": []}), ("item 0, sweep: k is []", "a list of values")),
    "sweep_of_names": (at("dictionaries.0.sweep", {"name": ["a"]}), ("item 0, sweep has the field 'name'",)),
    "sweep_of_sweeps": (at("dictionaries.0.sweep", {"sweep": [{}]}), ("item 0, sweep has the field 'sweep'",)),
    "sweep_misspelt": (at("dictionaries.0.sweep", {"kk": [1]}), ("kk: unknown key", "did you mean 'k'?")),
    "sweep_value": (at("dictionaries.0.sweep", {"k": [4, "many"]}), ("dictionaries.1.k", "'many'")),
    "sweep_into_a_number": (at("dictionaries.0.sweep", {"k.x": [1]}), ("item 0, sweep: k.x: k is 4", "a section")),
    "sweep_twice_the_same": (at("dictionaries.0.sweep", {"k": [4, 4]}), ("two dictionaries are named 'tiny-k4'",)),
    "sweep_with_long_name": (
        at("dictionaries.0.sweep", {"train.learning_rate": ["0." + 60 * "0" + "1"]}),
        ("dictionaries.0.name", "at most 64"),
    ),
    "sweep_too_many": (at("dictionaries.0.sweep", {"k": list(range(1, 2000))}), ("more than 1024 dictionaries",)),
    "sweep_k_above_features": (at("dictionaries.0.sweep", {"k": [4, 65]}), ("k 65 exceeds features 64",)),
    "variable_misspelt": (at("model.source", "${KB NOT}/x"), ("model.source", "${NAME:-default}")),
}


@pytest.mark.parametrize("case", FIELDS)
def test_plan_bad_manifest_is_one_line_and_writes_nothing(case: str, tiny_tree: Tree, tmp_path: Path) -> None:
    change, fragments = FIELDS[case]
    refused(tmp_path, tiny_tree, change, *fragments)


@pytest.mark.parametrize(
    "case", ["unknown_key", "k_above_features", "hook_point_of_nothing", "gzip_cut_short", "memory_that_cannot_fit"]
)
def test_run_bad_manifest_is_one_line_and_writes_nothing(case: str, tiny_tree: Tree, tmp_path: Path) -> None:
    change, fragments = FIELDS[case]
    refused(tmp_path, tiny_tree, change, *fragments, command="run")


@pytest.mark.chaos
@pytest.mark.parametrize("case", FIELDS)
def test_every_other_command_refuses_a_bad_manifest_and_writes_nothing(
    case: str, tiny_tree: Tree, tmp_path: Path
) -> None:
    """`run` says what `plan` says. Where the manifest itself is right, the others find that nothing was ever run."""
    change, fragments = FIELDS[case]
    refused(tmp_path, tiny_tree, change, *fragments, command="run")
    before = snapshot(tmp_path)
    for verb in ("resume", "status", "report", "verify", "repair", "gc"):
        assert_refused(invoke(verb, tmp_path / "manifest.yaml"), " -> ")
        assert snapshot(tmp_path) == before


FILES: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "empty": (b"", ("holds NoneType, expected a mapping",)),
    "list": (b"- a\n- b\n", ("holds list, expected a mapping",)),
    "not_utf8": (b"name: caf\xe9\n", ("cannot be read as text",)),
    "utf16": ("name: x\n".encode("utf-16"), ("cannot be read as text",)),
    "null_character": (b"name: \0\n", ("is not YAML", "#x0000")),
    "tab": (b"name:\n\t- x\n", ("line 2 is not YAML",)),
    "unclosed": (b"name: [a, b\n", ("is not YAML",)),
    "duplicate_key": (b"name: a\nroot: b\nname: c\n", ("line 3 is not YAML", "key 'name' stands twice")),
    "duplicate_key_deep_down": (b"model:\n  source: a\n  source: b\n", ("line 3", "key 'source' stands twice")),
    "list_as_key": (b"? [a]\n: b\n", ("is not YAML",)),
    "no_truth_value": (b"name: !!bool x\n", ("is not YAML",)),
    "no_timestamp": (b"name: !!timestamp x\n", ("is not YAML",)),
    "no_integer": (b'name: !!int ""\n', ("is not YAML",)),
    "no_date": (b"name: 2026-13-45\n", ("is not YAML",)),
    "number_of_10000_digits": (b"name: " + b"9" * 10_000, ("is not YAML",)),
    "nested_too_deep": (b"[" * 10_000, ("is not YAML",)),
    "holds_itself": (b"a: &x [*x]\n", ("a: unknown key",)),
    "huge": (b"# " + b"x" * 2**20, ("more than 1048576 bytes",)),
}


@pytest.mark.parametrize("case", FILES)
def test_plan_file_that_is_no_manifest_is_one_line(case: str, tmp_path: Path) -> None:
    body, fragments = FILES[case]
    path = tmp_path / "manifest.yaml"
    path.write_bytes(body)
    assert_refused(invoke("plan", path), "manifest.yaml", *fragments)
    assert snapshot(tmp_path).keys() == {"manifest.yaml"}


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.mkdir [{marker}]",
        "!!python/object/new:os.mkdir [{marker}]",
        "!!python/name:os.mkdir ''",
        "!!python/module:os ''",
        "!mine x",
    ],
)
def test_plan_yaml_tag_is_refused_and_not_executed(tag: str, tmp_path: Path) -> None:
    path = tmp_path / "manifest.yaml"
    path.write_text("name: " + tag.format(marker=tmp_path / "marker") + "\n")
    assert_refused(invoke("plan", path), "line 1 is not YAML", "could not determine a constructor")
    assert_refused(invoke("plan", path, "--set", "root=" + tag.format(marker=tmp_path / "marker")), "is not YAML")
    assert snapshot(tmp_path).keys() == {"manifest.yaml"}


def test_plan_manifest_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    assert_refused(invoke("plan", tmp_path / "none.yaml"), "none.yaml does not exist")
    assert_refused(invoke("plan", tmp_path), str(tmp_path), "cannot be read as text")
    (tmp_path / "file").write_text("x")
    assert_refused(invoke("plan", tmp_path / "file" / "m.yaml"), "m.yaml cannot be read as text")
    assert_refused(invoke("plan", tmp_path / ("x" * 300)), "cannot be read as text")
    assert_refused(invoke("plan", "/dev/zero"), "/dev/zero has more than")


OVERRIDES: dict[str, tuple[str, tuple[str, ...]]] = {
    "no_equals": ("compute.workers", ("--set 'compute.workers' is not of the form a.b=value",)),
    "no_name": ("=4", ("--set '=4' is not of the form",)),
    "empty_part": ("compute..workers=4", ("--set 'compute..workers=4' is not of the form",)),
    "empty": ("", ("--set '' is not of the form",)),
    "not_yaml": ("name=[1", ("--set name: the value", "is not YAML")),
    "no_truth_value": ("name=!!bool x", ("--set name: the value", "is not YAML")),
    "item_beyond": ("dictionaries.1.k=2", ("dictionaries has 1 items", "not '1'")),
    "item_negative": ("dictionaries.-1.k=2", ("dictionaries has 1 items", "not '-1'")),
    "item_by_name": ("dictionaries.tiny.k=2", ("dictionaries has 1 items", "not 'tiny'")),
    "item_in_other_digits": ("dictionaries.².k=2", ("dictionaries has 1 items", "not '²'")),
    "below_a_value": ("name.x=2", ("name is no section",)),
    "unknown_key": ("compute.worker=4", ("compute.worker: unknown key", "did you mean 'workers'?")),
    "wrong_type": ("compute.workers=many", ("compute.workers", "integer", "found 'many'")),
    "emptied": ("corpus=", ("corpus: expected a mapping", "found 'None'")),
    "credential": ("root=s3://me:word@bucket/x", ("root holds a credential",)),
}


@pytest.mark.parametrize("case", OVERRIDES)
def test_plan_bad_override_is_one_line_and_writes_nothing(case: str, tiny_manifest: Path, tmp_path: Path) -> None:
    override, fragments = OVERRIDES[case]
    before = snapshot(tmp_path)
    assert_refused(invoke("plan", tiny_manifest, "--set", override), *fragments)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        ([], ("Missing command",)),
        (["frobnicate"], ("No such command 'frobnicate'",)),
        (["--frobnicate"], ("No such option: --frobnicate",)),
        (["plan"], ("Missing argument 'MANIFEST'",)),
        (["plan", "a.yaml", "b.yaml"], ("unexpected extra argument", "b.yaml")),
        (["plan", "a.yaml", "--frobnicate"], ("No such option: --frobnicate",)),
        (["run", "a.yaml", "--set"], ("--set",)),
        (["schema", "a.yaml"], ("unexpected extra argument",)),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_command_wrong_arguments_are_one_line(arguments: list[str], fragments: tuple[str, ...]) -> None:
    assert_refused(invoke(*arguments), *fragments, "see `kilobasis --help`")


@pytest.mark.parametrize("variable", [False, True], ids=["plain", "from_the_environment"])
def test_plan_credential_is_not_printed(
    variable: bool, tiny_tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KB_URL", "s3://me:Hunter2@bucket/x")
    tiny_tree["root"] = "${KB_URL}" if variable else "s3://me:Hunter2@bucket/x"
    result = invoke("plan", write_manifest(tmp_path / "m.yaml", tiny_tree))
    assert_refused(result, "root holds a credential")
    assert "Hunter2" not in result.err + result.out


def test_plan_control_characters_do_not_reach_the_terminal(tiny_tree: Tree, tmp_path: Path) -> None:
    tiny_tree["harvest"]["dtype"] = "\x1b[2J\rfloat32\x07"
    result = invoke("plan", write_manifest(tmp_path / "m.yaml", tiny_tree))
    assert_refused(result, "harvest.dtype")
    assert result.err.rstrip("\n").isprintable()


def test_plan_root_with_foreign_files_is_refused(tiny_tree: Tree, tmp_path: Path) -> None:
    def change(_tree: Tree, folder: Path) -> None:
        (folder / "root").mkdir()
        (folder / "root" / "thesis.doc").write_text("precious")

    refused(tmp_path, tiny_tree, change, "root", "holds other files (thesis.doc)", "choose an empty or a new folder")


@pytest.mark.parametrize("command", ["plan", "run"])
def test_command_root_of_another_manifest_shows_what_differs(
    command: str, finished: SimpleNamespace, tmp_path: Path
) -> None:
    tree = finished.tree | {"name": "other", "root": str(shutil.copytree(finished.root, tmp_path / "root"))}
    tree["corpus"] = tree["corpus"] | {"heldout": 0.3}
    refused(
        tmp_path,
        tree,
        lambda tree, folder: None,
        "is used by the manifest 'tiny'",
        "name: tiny -> other",
        "corpus.heldout: 0.2 -> 0.3",
        "choose another root",
        command=command,
    )


@pytest.mark.parametrize("command", ["plan", "run"])
def test_command_disk_too_small_gives_both_sizes(
    command: str, tiny_tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects.shutil, "disk_usage", lambda _path: SimpleNamespace(total=10, used=0, free=1000))
    refused(
        tmp_path,
        tiny_tree,
        lambda tree, folder: None,
        "the run stores 1.",
        "MiB below",
        "free there are 1000 B",
        "make room",
        command=command,
    )


def test_plan_root_without_permission_is_refused(
    tiny_tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects.os, "access", lambda _path, mode: not mode & os.W_OK)
    refused(tmp_path, tiny_tree, lambda tree, folder: None, "root", "is not writable", "no permission on")


@pytest.mark.parametrize("command", ["status", "report", "resume"])
def test_command_before_any_run_says_so_and_writes_nothing(command: str, tiny_manifest: Path, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    assert_refused(invoke(command, tiny_manifest), "kilobasis run")
    assert snapshot(tmp_path) == before


def test_plan_loader_below_two_rows_is_refused(tiny_tree: Tree, tmp_path: Path) -> None:
    refused(tmp_path, tiny_tree, at("harvest.loader_memory", 1), "loader_memory 1")


LATE = {
    "latin_1_behind_what_planning_samples": corpus("a.jsonl", lines(count=60) + b'{"text": "caf\xe9"}\n'),
    "line_behind_what_planning_samples": corpus("a.jsonl", lines(count=60) + b'{"body": "abc"}\n'),
    "gzip_cut_short_behind_what_planning_samples": corpus("a.jsonl.gz", gzip.compress(lines(count=4000))[:-2000]),
    "zstd_cut_short_behind_what_planning_samples": corpus("a.jsonl.zst", zstandard.compress(lines(count=8000))[:-2000]),
}


@pytest.mark.parametrize("case", LATE)
def test_run_corpus_damaged_deep_down_fails_with_one_line(case: str, tiny_tree: Tree, tmp_path: Path) -> None:
    LATE[case](tiny_tree, tmp_path)
    path = write_manifest(tmp_path / "m.yaml", tiny_tree)
    assert invoke("plan", path).code == 0, "this test is about what planning does not see"
    result = invoke("run", path)
    *_progress, line = result.err.splitlines()
    assert result.code in (2, 5)
    assert line.startswith("kilobasis: ")
    assert "a.jsonl" in line
    assert "Traceback" not in result.err
    assert not list((tmp_path / "root").rglob("COMMITTED.json"))


def test_run_weights_that_lack_a_tensor_are_refused_not_made_up(tiny_tree: Tree, tmp_path: Path) -> None:
    def lose(folder: Path) -> None:
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        del weights["gpt_neox.layers.1.mlp.dense_h_to_4h.weight"]
        safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})

    model(lose)(tiny_tree, tmp_path)
    result = invoke("run", write_manifest(tmp_path / "m.yaml", tiny_tree))
    *_progress, line = result.err.splitlines()
    assert result.code == 2
    assert "lack 1 tensors" in line
    assert "gpt_neox.layers.1.mlp.dense_h_to_4h.weight" in line
