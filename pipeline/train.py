"""train: one dictionary from one hook point of the harvest, by a gang of DeepSpeed ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import pyarrow as pa
import torch
from pydantic import Field

from cluster.pool import Resources
from cluster.storage.create import create_or_adopt
from cluster.storage.path import StoragePath
from pipeline import harvest
from pipeline.activations.read import Stream
from pipeline.activations.source import open_store
from pipeline.dictionary import loop, model
from pipeline.dictionary.footprint import footprint
from pipeline.dictionary.model import DictionaryConfig
from pipeline.dictionary.parallel import Dense
from pipeline.stage import Committed, Estimate, Gang, Out, Params, Sources, Task
from pipeline.tokenize import parquet_body
from schemas.errors import ManifestError
from schemas.layouts import CURVES, DICTIONARY, DICTIONARY_CONFIG
from schemas.manifest import Dictionary, Manifest, Zero
from schemas.records import ObjectEntry, Outputs
from schemas.tables import CURVES as CURVES_SCHEMA
from schemas.training import Train

# Measured: a rank that has imported torch, deepspeed, zarr and pyarrow and joined its group.
RANK_MEMORY = 750 * 2**20
# Measured: what DeepSpeed imports for ZeRO alone, torch's compiler among it.
ZERO_MEMORY = 200 * 2**20
# Scores of a block of features for a block of tokens, where torch alone searches.
SEARCH_MEMORY = 2**27


class TrainParams(Params):
    """Identity of a training run."""

    hook_point: str
    target: str | None
    features: int
    activation: Literal["topk", "batch_topk", "jumprelu", "relu"]
    k: int
    model_digest: str
    settings: Train
    model: str = Field(exclude=True)


class TrainTask(Task):
    """What every rank of the gang is told."""

    harvest: Committed
    params: TrainParams
    stage: str
    checkpoint_seconds: float
    feature_ranks: int
    zero: Zero
    accumulate: int
    deterministic: bool


def params(manifest: Manifest, dictionary: Dictionary | None, sources: Sources) -> TrainParams:
    """See `Stage.params`."""
    assert dictionary is not None
    return TrainParams(
        hook_point=dictionary.encoded,
        target=None if dictionary.transcode is None else dictionary.explained,
        features=dictionary.size(sources.model.widths[dictionary.encoded]),
        activation=dictionary.activation,
        k=dictionary.k,
        # For people. The digest says which model it is, whatever its folder is called.
        model=sources.model.place.source.rstrip("/").rsplit("/", 1)[-1],
        model_digest=sources.model.digest,
        settings=dictionary.train,
    )


def check(manifest: Manifest, dictionary: Dictionary | None, sources: Sources) -> None:
    """Refuse a dictionary that cannot be."""
    assert dictionary is not None
    settings = params(manifest, dictionary, sources)
    if settings.k > settings.features:
        raise ManifestError(
            f"dictionary {dictionary.name!r}: k {settings.k} exceeds its {settings.features} features",
            f"set k to {settings.features} or less",
        )
    prefixes = settings.settings.prefixes
    if prefixes and prefixes[-1] >= settings.features:
        raise ManifestError(
            f"dictionary {dictionary.name!r}: train.prefixes has {prefixes[-1]}, expected less than its "
            f"{settings.features} features",
            "leave out what is not smaller; the whole dictionary comes by itself",
        )
    parts = manifest.compute.sharding.features
    if settings.features % parts:
        below = settings.features - settings.features % parts
        raise ManifestError(
            f"dictionary {dictionary.name!r}: {settings.features} features cannot be shared evenly by "
            f"compute.sharding.features {parts}",
            f"set features to {below or parts} or {below + parts}",
        )
    if dictionary.train.filter.skip_positions >= manifest.corpus.context:
        raise ManifestError(
            f"dictionary {dictionary.name!r}: train.filter.skip_positions {dictionary.train.filter.skip_positions} "
            f"leaves no row of sequences of {manifest.corpus.context} tokens",
            f"set it below {manifest.corpus.context}",
        )


def estimate(manifest: Manifest, dictionary: Dictionary | None, sources: Sources) -> Estimate:
    """See `Stage.estimate`.

    A rank holds weights and what the optimizer adds to them, and a checkpoint being packed, see `footprint`; three
    slabs (one streamed, one read ahead, one being permuted); and the step: scores of a block of features, candidates,
    the gather, and the tokens of a pass in a few forms.
    """
    assert dictionary is not None
    settings = params(manifest, dictionary, sources)
    width, target = sources.model.widths[dictionary.encoded], sources.model.widths[dictionary.explained]
    layout = harvest.store_layout(harvest.params(manifest, None, sources), sources.corpus.train_rows)
    read = {dictionary.encoded, dictionary.explained}
    slab = max(layout.geometry.slab_count(0), 1) * (sum(layout.row_bytes(each) for each in read) + 16)
    sample = layout.geometry.slab_count(0) * sum(sources.model.widths[each] for each in read) * 4
    train = settings.settings
    aux = train.auxiliary(width)
    sharding = manifest.compute.sharding
    share = train.batch // sharding.data
    # RowAdam's gradient is of the whole batch; dense passes see a part each, and curves all that is explained.
    dense = train.optimizer == "adam"
    tokens = share // manifest.compute.accumulate if dense else train.batch
    step = (tokens * (8 * (width + target) + 24 * (settings.k + aux)) + min(tokens, share) * 1024) * 4 + SEARCH_MEMORY
    step += train.batch * 8 * target * 4 if dense and tokens < train.batch else 0
    held = footprint(train, manifest.compute, settings.features, width + target)
    steps = -(-settings.settings.tokens // settings.settings.batch)
    rank = RANK_MEMORY + (ZERO_MEMORY if manifest.compute.zero.stage else 0)
    how = f", ZeRO {manifest.compute.zero.stage}" if manifest.compute.zero.stage else ""
    mesh = f", mesh {sharding.features} x {sharding.data}" if sharding.ranks > 1 else ""
    return Estimate(
        units=1,
        rows=settings.settings.tokens,
        stored_bytes=held.weights + held.state,
        objects=5,
        memory=rank + held.peak + 3 * slab + 3 * sample + step,
        workers=sharding.ranks,
        note=f"F {settings.features} (F/d {settings.features / width:g}), k {settings.k}, {steps} steps{mesh}{how}",
    )


def run(inputs: Mapping[str, Committed], params: TrainParams, out: Out) -> Outputs:
    """Train, then commit the dictionary and its curves."""
    task = TrainTask(
        unit="train",
        harvest=inputs["harvest"],
        params=params,
        stage=out.stage,
        checkpoint_seconds=out.compute.checkpoint_seconds,
        feature_ranks=out.compute.sharding.features,
        zero=out.compute.zero,
        accumulate=out.compute.accumulate,
        deterministic=out.compute.deterministic,
    )
    resources = Resources(threads=out.compute.rank_threads, gpus=out.compute.gpus)
    made: Outputs = out.gang(train_rank, task, out.compute.sharding.ranks, resources)
    return made


def train_rank(task: TrainTask, path: StoragePath, gang: Gang) -> Outputs | None:
    """One rank of the gang; rank 0 writes what comes of it, and says so."""
    settings = task.params
    if task.deterministic:
        torch.use_deterministic_algorithms(True)
    store = open_store(task.harvest)
    read = (settings.hook_point,) if settings.target is None else (settings.hook_point, settings.target)
    expected = sum(int(task.harvest.facts["hashes"][hook_point], 16) for hook_point in read)
    stream = Stream(store, read, settings.settings.seed, settings.settings.batch, settings.settings.filter, expected)
    width = store.layout.widths[settings.hook_point]
    config = DictionaryConfig(
        width=width,
        features=settings.features,
        k=settings.k,
        activation=settings.activation,
        prefixes=settings.settings.prefixes,
        hook_point=settings.hook_point,
        target=settings.target,
        target_width=None if settings.target is None else store.layout.widths[settings.target],
        model=settings.model,
        model_digest=settings.model_digest,
    )
    in_bfloat16 = settings.settings.weights == "bfloat16"
    dense = Dense(task.zero.stage, task.zero.offload, task.accumulate, in_bfloat16)
    trained = loop.train(
        task.stage, stream, config, settings.settings, task.checkpoint_seconds, task.feature_ranks, gang, dense
    )
    if trained is None:
        return None
    columns = dict(zip(CURVES_SCHEMA.names, zip(*trained.curves, strict=True), strict=True))
    table = pa.Table.from_pydict({name: list(values) for name, values in columns.items()}).cast(CURVES_SCHEMA)
    bodies = {
        DICTIONARY: model.to_bytes(trained.dictionary),
        DICTIONARY_CONFIG: config.model_dump_json(indent=1).encode(),
        CURVES: parquet_body(table),
    }
    for key, body in bodies.items():
        create_or_adopt(path / key, body)
    facts: dict[str, Any] = {
        **loop.describe(trained.dictionary, trained.since_fired_F, settings.settings),
        "steps": trained.progress.step,
        "tokens": trained.progress.tokens,
        "scale": trained.progress.scale,
    }
    return Outputs(objects=tuple(ObjectEntry.of(key, body) for key, body in bodies.items()), facts=facts)
