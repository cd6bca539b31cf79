"""identify: which known feature each feature of a dictionary is, in tables and an HTML report.

It stands in catalog's place for synthetic harvests, under its name: statistics of every feature in one pass over stored
rows, and instead of examples, for which there is no text, the known features whose directions are nearest.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import torch
from torch.nn.functional import normalize

from cluster.pool import Resources
from cluster.storage.create import create_or_adopt
from cluster.storage.formats import read_document, read_table
from cluster.storage.parsing import parsing
from cluster.storage.path import StoragePath
from pipeline.activations.layout import planned_layout
from pipeline.activations.source import open_store
from pipeline.dictionary.firings import by_feature, statistics
from pipeline.dictionary.footprint import coding
from pipeline.dictionary.stored import open_dictionary
from pipeline.generate import truth_bytes
from pipeline.matching import Counterparts, searched
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
from pipeline.recovery.neighbours import neighbours
from pipeline.recovery.search import Searched
from pipeline.report.known import Known
from pipeline.report.page import render
from pipeline.stage import Committed, Estimate, Out, Params, Sources, Task
from pipeline.tokenize import parquet_body
from pipeline.truth import open_truth
from schemas.layouts import CURVES, FEATURES, MATCHES, METRICS, REPORT
from schemas.manifest import Dictionary, Manifest
from schemas.records import ObjectEntry, Outputs, Unit
from schemas.tables import CURVES as CURVES_SCHEMA
from schemas.tables import EXAMPLES as EXAMPLES_SCHEMA
from schemas.tables import KNOWN as KNOWN_SCHEMA
from schemas.tables import MATCHES as MATCHES_SCHEMA

WEIGHTS = "weights.parquet"

# Measured: a worker that has imported torch, transformers, zarr and pyarrow.
WORKER_MEMORY = 800 * 2**20


class IdentifyParams(Params):
    """Identity of a catalog of known features."""

    dictionary: str
    hook_point: str
    tokens: int
    examples: int
    report_features: int


class UnitTask(Task):
    """One unit of the harvest."""

    index: int
    harvest: Committed
    train: Committed
    params: IdentifyParams


class WeightsTask(Task):
    """What the weights alone say: of themselves, and beside the true directions."""

    harvest: Committed
    train: Committed
    evaluated: Committed
    params: IdentifyParams


def params(_manifest: Manifest, dictionary: Dictionary | None, _sources: Sources) -> IdentifyParams:
    """See `Stage.params`."""
    assert dictionary is not None
    return IdentifyParams(
        dictionary=dictionary.name,
        hook_point=dictionary.encoded,
        # Around a row there is no text.
        **dictionary.catalog.model_dump(exclude={"window"}),
    )


def check(manifest: Manifest, dictionary: Dictionary | None, sources: Sources) -> None:
    """Nothing to refuse that others do not refuse."""


def estimate(manifest: Manifest, dictionary: Dictionary | None, sources: Sources) -> Estimate:
    """See `Stage.estimate`. A worker holds one unit and its code, or the weights beside the true directions."""
    assert dictionary is not None
    assert manifest.synthetic is not None
    width = sources.model.widths[dictionary.encoded]
    features = dictionary.size(width)
    layout = planned_layout(manifest.harvest, sources.model.widths, sources.corpus.train_rows)
    rows = min(layout.rows, dictionary.catalog.tokens)
    units = -(-rows // layout.unit_rows)
    matches = features * dictionary.catalog.examples * 32
    encoding = coding(dictionary, features, width, ENCODE_ROWS)
    unit = layout.unit_rows * (width * 12 + dictionary.k * 64) + encoding
    beside = truth_bytes(manifest.synthetic) * 3
    return Estimate(
        units=units + 1,
        rows=rows,
        stored_bytes=units * features * 24 + features * 96 + matches,
        objects=2 * units + 9,
        memory=WORKER_MEMORY + 3 * (2 * width + 1) * features * 4 + max(unit, beside) + 4 * matches,
        workers=manifest.compute.workers,
    )


def run(inputs: Mapping[str, Committed], params: IdentifyParams, out: Out) -> Outputs:
    """Collect every unit, merge, write the tables and the report."""
    harvest, train = inputs["harvest"], inputs["train"]
    resources = Resources(threads=out.compute.threads)
    alone = WeightsTask(unit="weights", harvest=harvest, train=train, evaluated=inputs["evaluate"], params=params)
    weights = out.map(describe_weights, [alone], resources)["weights"].made
    cut = open_store(harvest).layout.geometry
    tasks = [
        UnitTask(unit=f"{index:06d}", index=index, harvest=harvest, train=train, params=params)
        for index in spread(cut.units, cut.unit_rows, params.tokens)
    ]
    records = out.map(collect_unit, tasks, resources)
    collected = [records[unit].made for unit in sorted(records)]
    rows = sum(unit.rows for unit in collected)
    features = feature_table(out.path, collected, weights, rows)
    matches = read_table(out.path, weights.objects[1], MATCHES_SCHEMA)
    written = [
        out.write(FEATURES, parquet_body(features, 65_536)),
        out.write(MATCHES, parquet_body(matches, 65_536)),
        out.write(REPORT, _report(inputs, params, features, matches, collected)),
    ]
    fired = int((np.asarray(features["fires"]) > 0).sum())
    return Outputs(objects=tuple(written), facts={"tokens": rows, "fired": fired})


def collect_unit(task: UnitTask, path: StoragePath) -> Unit:
    """Statistics of one unit of the harvest."""
    dictionary = open_dictionary(task.train).dictionary
    x_ND, _, _ = open_store(task.harvest).unit(task.params.hook_point, task.index)
    z_NK, indices_NK = encode_rows(dictionary, x_ND)
    order_E, starts_F = by_feature(z_NK, indices_NK, dictionary.features)
    key, body = f"statistics/{task.unit}.parquet", parquet_body(statistics(z_NK.reshape(-1)[order_E], starts_F))
    create_or_adopt(path / key, body)
    facts = {"norms": norm_counts(x_ND.float().norm(dim=1))}
    return Unit(objects=(ObjectEntry.of(key, body),), rows=len(x_ND), facts=facts)


def describe_weights(task: WeightsTask, path: StoragePath) -> Unit:
    """Norms and neighbours of every feature, and the represented known features that are nearest."""
    dictionary = open_dictionary(task.train).dictionary
    truth = open_truth(task.harvest, task.params.hook_point)
    nothing: list[list[int]] = [[] for _ in range(dictionary.features)]
    represented_R = torch.nonzero(truth.represented_M).squeeze(1)
    known_FX, cosine_FX = torch.zeros((dictionary.features, 0), dtype=torch.int64), torch.zeros(dictionary.features, 0)
    twins: tuple[torch.Tensor, torch.Tensor] | None = None
    if len(represented_R):
        found, examples = _searched(task.evaluated), task.params.examples
        near = found.near
        if min(examples, len(represented_R)) > near.indices_QM.shape[1]:
            unit_FD = normalize(dictionary.W_dec.detach(), dim=1)
            near = neighbours(unit_FD, truth.directions_MD[represented_R], examples)
        known_FX, cosine_FX = represented_R[near.indices_QM[:, :examples]], near.cosines_QM[:, :examples]
        if found.decoder_twin is not None and dictionary.features > 1:
            twins = found.decoder_twin.indices_QM[:, 0], found.decoder_twin.cosines_QM[:, 0]
    features, ranks = known_FX.shape
    columns = {
        "feature": np.repeat(np.arange(features), ranks),
        "rank": np.tile(np.arange(ranks), features),
        "known": known_FX.reshape(-1).numpy(),
        "cosine": cosine_FX.reshape(-1).numpy(),
        "known_fires": truth.fires_M[known_FX.reshape(-1)].numpy(),
    }
    bodies = {
        WEIGHTS: parquet_body(weights_table(dictionary, nothing, nothing, twins)),
        f"nearest/{MATCHES}": parquet_body(pa.Table.from_pydict(columns, MATCHES_SCHEMA)),
    }
    for key, body in bodies.items():
        create_or_adopt(path / key, body)
    return Unit(objects=tuple(ObjectEntry.of(key, body) for key, body in bodies.items()))


def _searched(evaluated: Committed) -> Searched:
    """What every feature found when it was judged."""
    with parsing(evaluated.path, "judgement of a synthetic harvest"):
        found = Counterparts.model_validate(evaluated.facts["counterparts"])
    return searched(found.learned, evaluated.path)


def _report(
    inputs: Mapping[str, Committed],
    settings: IdentifyParams,
    features: pa.Table,
    matches: pa.Table,
    collected: list[Unit],
) -> bytes:
    harvest, train, evaluated = inputs["harvest"], inputs["train"], inputs["evaluate"]
    judged = read_document(evaluated.path, evaluated.entry(METRICS))
    with parsing(evaluated.path, "judgement of a synthetic harvest"):
        entry = ObjectEntry.model_validate(evaluated.facts["known"])
    known = read_table(evaluated.path, entry, KNOWN_SCHEMA)
    shown = densest(features, settings.report_features)
    saved = open_dictionary(train)
    facts = {
        "source": saved.config.model,
        "hook point": saved.config.hook_point,
        "width d": train.facts["width"],
        "known features": f"{judged['known']['known']:,}",
        "of them represented": f"{judged['known']['represented']:,}",
        "known features on a row": f"{judged['known']['known_l0']:.4g}",
        "features F": f"{train.facts['features']:,}",
        "F / d": f"{train.facts['features'] / train.facts['width']:g}",
        "k": train.facts["k"],
        "rows trained": f"{train.facts['tokens']:,}",
        "training rows": f"{harvest.facts['layout']['rows']:,}",
        "rows catalogued": f"{sum(unit.rows for unit in collected):,}",
        "held-out rows": f"{judged['tokens']:,}",
        "dead means": f"silent for {train.facts['dead_window_tokens']:,} rows",
    }
    fired_F = features["fires"].to_numpy() > 0
    first = matches.filter(pa.compute.equal(matches["rank"], 0))
    return render(
        title=settings.dictionary,
        facts=facts,
        metrics=judged,
        curves=read_table(train.path, train.entry(CURVES), CURVES_SCHEMA),
        features=shown,
        examples=EXAMPLES_SCHEMA.empty_table(),
        norms=norm_histogram(collected),
        token_text=str,
        shown_of=features.num_rows,
        known=Known(
            metrics=judged["dictionary"],
            cosines_of_known=known.filter(known["represented"])["cosine"].to_numpy(),
            by_fires=judged.get("by_fires", ()),
            cosines_of_features=first["cosine"].to_numpy()[fired_F[first["feature"].to_numpy()]],
            toys=harvest.facts["toys"],
            hook_point=settings.hook_point,
            matches=matches.filter(pa.compute.is_in(matches["feature"], value_set=shown["feature"].combine_chunks())),
        ),
    )
