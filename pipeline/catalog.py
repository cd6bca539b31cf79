"""catalog: what each feature does, in one pass over stored rows: statistics, top examples, an HTML report.

A unit of the catalog is a unit of the harvest, read back in corpus order, so that a feature's activation
on the tokens around an example is at hand. Each keeps its own best examples per feature; the best of all
are picked at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from pydantic import Field

from cluster.pool import Resources
from cluster.storage.create import create_or_adopt
from cluster.storage.formats import read_document, read_table
from cluster.storage.path import StoragePath
from pipeline.activations.layout import planned_layout
from pipeline.activations.source import open_store
from pipeline.device import CARD_MEMORY, device
from pipeline.dictionary.firings import by_feature, statistics
from pipeline.dictionary.footprint import coding
from pipeline.dictionary.model import DictionaryConfig
from pipeline.dictionary.stored import open_dictionary
from pipeline.dictionary.weights import direct_effect
from pipeline.profiles import (
    ENCODE_ROWS,
    densest,
    encode_rows,
    feature_table,
    norm_counts,
    norm_histogram,
    spread,
    weights_table,
)
from pipeline.report.page import render
from pipeline.sources import models
from pipeline.stage import Committed, Estimate, Out, Params, Sources, Task
from pipeline.tokenize import parquet_body
from schemas.layouts import CURVES, EXAMPLES, FEATURES, METRICS, REPORT
from schemas.manifest import Dictionary, Manifest, Model
from schemas.records import ObjectEntry, Outputs, Unit
from schemas.tables import CURVES as CURVES_SCHEMA
from schemas.tables import EXAMPLES as EXAMPLES_SCHEMA

PROMOTED = 8

# Measured: a worker that has imported torch, transformers, zarr and pyarrow.
WORKER_MEMORY = 800 * 2**20

# A sequence across a border has examples in two units; its first row's id tells that it is one.
UNIT_EXAMPLES = EXAMPLES_SCHEMA.append(pa.field("sequence", pa.int64()))


class CatalogParams(Params):
    """Identity of a catalog."""

    dictionary: str
    hook_point: str
    tokens: int
    examples: int
    window: int
    report_features: int
    skip_positions: int
    model_digest: str
    model: Model = Field(exclude=True)


class CatalogTask(Task):
    """One unit of the harvest."""

    index: int
    harvest: Committed
    train: Committed
    params: CatalogParams
    gpus: float = 0.0


class WeightsTask(Task):
    """What the weights alone say."""

    train: Committed
    params: CatalogParams
    gpus: float = 0.0


def params(manifest: Manifest, dictionary: Dictionary | None, sources: Sources) -> CatalogParams:
    """See `Stage.params`."""
    assert dictionary is not None
    return CatalogParams(
        dictionary=dictionary.name,
        hook_point=dictionary.encoded,
        **dictionary.catalog.model_dump(),
        skip_positions=dictionary.train.filter.skip_positions,
        model_digest=sources.model.digest,
        model=sources.model.place,
    )


def check(manifest: Manifest, dictionary: Dictionary | None, sources: Sources) -> None:
    """Nothing to refuse that others do not refuse."""


def estimate(manifest: Manifest, dictionary: Dictionary | None, sources: Sources) -> Estimate:
    """See `Stage.estimate`. A worker holds one unit, its codes, and its best examples of every feature."""
    assert dictionary is not None
    width = sources.model.widths[dictionary.encoded]
    features = dictionary.size(width)
    layout = planned_layout(manifest.harvest, sources.model.widths, sources.corpus.train_rows)
    rows = min(layout.rows, dictionary.catalog.tokens)
    units = -(-rows // layout.unit_rows)
    span = 2 * dictionary.catalog.window + 1
    examples = features * dictionary.catalog.examples * (span * 8 + 32)
    weights = (2 * width + 1) * features * 4
    unit = layout.unit_rows * (width * 12 + dictionary.k * 64)
    on_card = bool(manifest.compute.gpus)
    encoding = coding(dictionary, features, width, ENCODE_ROWS, on_card)
    held = 3 * weights + unit + 4 * examples + sources.model.parameters * 8
    return Estimate(
        units=units + 1,
        rows=rows,
        stored_bytes=(units + 2) * examples // 2,
        objects=3 * units + 8,
        memory=WORKER_MEMORY + held + (0 if on_card else encoding),
        workers=manifest.compute.workers,
        gpus=manifest.compute.gpus,
        card=CARD_MEMORY + sources.model.parameters * 4 + 2 * weights + unit + encoding if on_card else 0,
    )


def run(inputs: Mapping[str, Committed], params: CatalogParams, out: Out) -> Outputs:
    """Collect every unit, merge, write the tables and the report."""
    harvested, train = inputs["harvest"], inputs["train"]
    gpus = out.compute.gpus
    resources = Resources(threads=out.compute.threads, gpus=gpus)
    weighing = WeightsTask(unit="weights", train=train, params=params, gpus=gpus)
    weights = out.map(describe_weights, [weighing], resources)
    cut = open_store(harvested).layout.geometry
    units = spread(cut.units, cut.unit_rows, params.tokens)
    tasks = [
        CatalogTask(unit=f"{index:06d}", index=index, harvest=harvested, train=train, params=params, gpus=gpus)
        for index in units
    ]
    records = out.map(collect_unit, tasks, resources)
    collected = [records[unit].made for unit in sorted(records)]
    tokens = sum(unit.rows for unit in collected)
    features = feature_table(out.path, collected, weights["weights"].made, tokens)
    examples = _best([read_table(out.path, unit.objects[1]) for unit in collected], params.examples, features.num_rows)
    written = [
        out.write(FEATURES, parquet_body(features, 65_536)),
        out.write(EXAMPLES, parquet_body(examples, 65_536)),
    ]
    report = _report(inputs, params, features, examples, collected, tokens)
    return Outputs(
        objects=(*written, out.write(REPORT, report)),
        facts={"tokens": tokens, "fired": int((np.asarray(features["fires"]) > 0).sum())},
    )


def collect_unit(task: CatalogTask, path: StoragePath) -> Unit:
    """Statistics and best examples of one unit of the harvest."""
    settings = task.params
    dictionary = open_dictionary(task.train, device(task.gpus)).dictionary
    store = open_store(task.harvest)
    x_ND, tokens_N, positions_N = store.unit(settings.hook_point, task.index)
    first, _ = store.layout.geometry.span(task.index)
    z_NK, indices_NK = encode_rows(dictionary, x_ND)
    # What training passed over by position is no part of what a feature does.
    kept_N = positions_N >= settings.skip_positions
    z_NK[~kept_N] = 0.0
    norms_N = x_ND.float().norm(dim=1)
    order_E, starts_F = by_feature(z_NK, indices_NK, dictionary.features)
    values_E = z_NK.reshape(-1)[order_E]
    bodies = {
        "statistics": parquet_body(statistics(values_E, starts_F)),
        "examples": parquet_body(
            _examples(order_E // z_NK.shape[1], values_E, starts_F, tokens_N, positions_N, first, settings)
        ),
    }
    objects = []
    for name, body in bodies.items():
        key = f"{name}/{task.unit}.parquet"
        create_or_adopt(path / key, body)
        objects.append(ObjectEntry.of(key, body))
    return Unit(objects=tuple(objects), rows=int(kept_N.sum()), facts={"norms": norm_counts(norms_N)})


def _examples(
    rows_E: npt.NDArray[np.int64],
    values_E: npt.NDArray[np.float32],
    starts_F: npt.NDArray[np.int64],
    tokens_N: npt.NDArray[np.int32],
    positions_N: npt.NDArray[np.int32],
    first: int,
    settings: CatalogParams,
) -> pa.Table:
    """The strongest activations of every feature, at most one a sequence, with the tokens around them."""
    sequence_N = np.cumsum(positions_N == 0)
    feature_E = np.repeat(np.arange(len(starts_F) - 1), np.diff(starts_F))
    # Entries of one feature in one sequence (G) stand together. The strongest of them, the earliest on a tie,
    # is the one that may be shown: one example a sequence shows more than ten of one.
    pair_E = feature_E * (sequence_N[-1] + 1) + sequence_N[rows_E]
    starts_G = np.flatnonzero(np.diff(pair_E, prepend=-1))
    group_E = np.repeat(np.arange(len(starts_G)), np.diff(starts_G, append=len(pair_E)))
    largest_G = np.maximum.reduceat(values_E, starts_G) if len(starts_G) else values_E
    peak_E = np.flatnonzero(values_E == largest_G[group_E])
    best_G = peak_E[np.flatnonzero(np.diff(group_E[peak_E], prepend=-1))]
    # Bits of positive floats sort as the floats do, so that one key sorts by feature and falling activation.
    key_G = feature_E[best_G].astype(np.uint64) << 32 | (~values_E[best_G].view(np.uint32)).astype(np.uint64)
    best_X = best_G[np.argsort(key_G, kind="stable")]
    rank_X = np.arange(len(best_X)) - np.searchsorted(feature_E[best_X], feature_E[best_X])
    best_X, rank_X = best_X[rank_X < settings.examples], rank_X[rank_X < settings.examples]
    feature_X, row_X = feature_E[best_X], rows_E[best_X]
    start_X, stop_X = _windows(row_X, positions_N, sequence_N, settings.window)
    # All windows one after the other: which row each of their tokens is, and what the feature does there.
    offsets = np.concatenate([[0], np.cumsum(stop_X - start_X)])
    row_W = np.arange(offsets[-1]) + np.repeat(start_X - offsets[:-1], stop_X - start_X)
    wanted_W = np.repeat(feature_X, stop_X - start_X) * len(positions_N) + row_W
    entry_E = feature_E * len(positions_N) + rows_E
    at_W = np.minimum(np.searchsorted(entry_E, wanted_W), len(entry_E) - 1)
    activations_W = np.where(entry_E[at_W] == wanted_W, values_E[at_W], np.float32(0.0))
    columns = {
        "feature": feature_X,
        "rank": rank_X,
        "row": first + row_X,
        "activation": values_E[best_X],
        "peak": row_X - start_X,
        "tokens": pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), tokens_N[row_W]),
        "activations": pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), activations_W),
        "sequence": first + row_X - positions_N[row_X],
    }
    return pa.Table.from_pydict(columns, UNIT_EXAMPLES)


def _windows(
    row_X: npt.NDArray[np.int64],
    positions_N: npt.NDArray[np.int32],
    sequence_N: npt.NDArray[np.int64],
    window: int,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows [start, stop) around rows that are in the same sequence and the same unit."""
    ends = np.append(np.flatnonzero(np.diff(sequence_N)) + 1, len(sequence_N))
    start_X = np.maximum(row_X - np.minimum(window, positions_N[row_X]), 0)
    return start_X, np.minimum(ends[np.searchsorted(ends, row_X, side="right")], row_X + window + 1)


def describe_weights(task: WeightsTask, path: StoragePath) -> Unit:
    """Norms, nearest neighbours and, in a language model, the output tokens a feature promotes."""
    dictionary = open_dictionary(task.train, device(task.gpus)).dictionary
    body = parquet_body(weights_table(dictionary, *_direct_effect(task.params, dictionary.W_dec)))
    create_or_adopt(path / "weights.parquet", body)
    return Unit(objects=(ObjectEntry.of("weights.parquet", body),))


def _direct_effect(settings: CatalogParams, W_dec_FD: torch.Tensor) -> tuple[list[list[int]], list[list[int]]]:
    """Empty where the model has no unembedding, or where the hook point is not of its width."""
    loaded = models.load(settings.model)
    head = loaded.model.get_output_embeddings() if loaded.is_causal_lm else None  # type: ignore[operator]
    if head is None or head.weight.shape[1] != W_dec_FD.shape[1]:
        return [[] for _ in W_dec_FD], [[] for _ in W_dec_FD]
    return direct_effect(W_dec_FD, head.weight.to(W_dec_FD), PROMOTED)


def _best(tables: list[pa.Table], examples: int, features: int) -> pa.Table:
    """The best examples of all units: strongest first, the earlier row on a tie, one a sequence."""
    table = pa.concat_tables(tables).sort_by(
        [("feature", "ascending"), ("activation", "descending"), ("row", "ascending")]
    )
    sequence = table["sequence"].to_numpy()
    pairs = table["feature"].to_numpy() * (sequence.max(initial=0) + 1) + sequence
    first = np.zeros(len(pairs), bool)
    first[np.unique(pairs, return_index=True)[1]] = True
    table = table.filter(pa.array(first)).drop_columns("sequence")
    feature = table["feature"].to_numpy()
    starts = np.searchsorted(feature, np.arange(features))
    rank = np.arange(len(feature)) - starts[feature]
    table = table.set_column(1, "rank", pa.array(rank.astype(np.int32)))
    return table.filter(pa.array(rank < examples)).cast(EXAMPLES_SCHEMA).combine_chunks()


def _report(
    inputs: Mapping[str, Committed],
    settings: CatalogParams,
    features: pa.Table,
    examples: pa.Table,
    collected: list[Unit],
    tokens: int,
) -> bytes:
    train = inputs["train"]
    judged = read_document(inputs["evaluate"].path, inputs["evaluate"].entry(METRICS))
    curves = read_table(train.path, train.entry(CURVES), CURVES_SCHEMA)
    shown = densest(features, settings.report_features)
    if shown.num_rows < features.num_rows:
        examples = examples.filter(pa.compute.is_in(examples["feature"], value_set=shown["feature"].combine_chunks()))
    saved = open_dictionary(train)
    facts = {
        "model": saved.config.model,
        "hook point": " \u2192 ".join(each for each in (saved.config.hook_point, saved.config.target) if each),
        "width d": train.facts["width"],
        "features F": f"{train.facts['features']:,}",
        "F / d": f"{train.facts['features'] / train.facts['width']:g}",
        "k": train.facts["k"],
        "tokens trained": f"{train.facts['tokens']:,}",
        "training rows": f"{inputs['harvest'].facts['layout']['rows']:,}",
        "tokens catalogued": f"{tokens:,}",
        "held-out tokens": f"{judged['tokens']:,}",
        **_of_tree(saved.config, judged),
        **_of_values(judged),
        "dead means": f"silent for {train.facts['dead_window_tokens']:,} tokens",
    }
    return render(
        title=settings.dictionary,
        facts=facts,
        metrics=judged,
        curves=curves,
        features=shown,
        examples=examples,
        norms=norm_histogram(collected),
        token_text=token_texts(settings),
        shown_of=features.num_rows,
    )


def _of_tree(config: DictionaryConfig, judged: Mapping[str, Any]) -> dict[str, str]:
    """What is to be said of a tree: its levels, and what it misses by looking at few of its features."""
    if config.tree is None:
        return {}
    tree, searched = config.tree, judged.get("audit")
    facts = {
        "tree": f"{config.features // tree.size:,} parents, {tree.children:,} children each; {tree.size} in a subtree"
    }
    if searched:
        facts["children searched"] = (
            f"of {tree.routed + tree.always:,} parents a token: {searched['routing_recall']:.0%} of the best of all; "
            f"FVU {searched['fvu_encoded']:.4f}, with all {searched['fvu_exact']:.4f}"
        )
    return facts


def _of_values(judged: Mapping[str, Any]) -> dict[str, str]:
    """What the encoder loses by giving each feature its value by itself."""
    if "audit" not in judged:
        return {}
    sample = judged["audit"]
    return {
        "values fitted together": f"FVU {sample['fvu_refitted']:.4f} in place of {sample['fvu_encoded']:.4f}, on "
        f"{sample['tokens']:,} tokens"
    }


def token_texts(settings: CatalogParams) -> Callable[[int], str]:
    """Printable text of a token id."""
    tokenizer = models.load_tokenizer(settings.model)

    def text(token: int) -> str:
        return str(tokenizer.decode([token]))

    return text
