"""train: dictionaries from one hook point of the harvest, in one pass of it, by a gang of DeepSpeed ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field

from cluster.pool import Resources
from cluster.storage.create import create_or_adopt
from pipeline.activations.layout import StoreLayout, planned_layout
from pipeline.activations.read import Stream
from pipeline.activations.source import open_store
from pipeline.device import CARD_MEMORY
from pipeline.dictionary import loop, parallel
from pipeline.dictionary.footprint import descending, firing, footprint, searching
from pipeline.dictionary.model import SAMPLE, DictionaryConfig, TreeShape
from pipeline.dictionary.stored import files
from pipeline.stage import Committed, Estimate, Gang, Job, Member, Out, Params, Sources, Task
from pipeline.tokenize import parquet_body
from schemas.compute import Zero
from schemas.errors import KilobasisError, ManifestError
from schemas.layouts import CURVES, DICTIONARY_CONFIG
from schemas.manifest import Dictionary, Manifest
from schemas.records import ObjectEntry, Outputs
from schemas.tables import CURVES as CURVES_SCHEMA
from schemas.training import Train
from schemas.tree import Tree, require_parents

# Measured: a rank that has imported torch, deepspeed, zarr and pyarrow and joined its group.
RANK_MEMORY = 750 * 2**20
# Measured: what DeepSpeed imports for ZeRO alone, torch's compiler among it.
ZERO_MEMORY = 200 * 2**20


class TrainParams(Params):
    """Identity of a training run."""

    hook_point: str
    target: str | None
    features: int
    activation: Literal["topk", "batch_topk", "jumprelu", "relu"]
    k: int
    tree: Tree | None = Field(default=None, exclude_if=lambda value: value is None)
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
    features = dictionary.size(sources.model.widths[dictionary.encoded])
    return TrainParams(
        hook_point=dictionary.encoded,
        target=None if dictionary.transcode is None else dictionary.explained,
        features=features,
        activation=dictionary.activation,
        k=dictionary.k,
        tree=None if dictionary.tree is None else dictionary.tree.resolved(dictionary.k),
        # For people. The digest says which model it is, whatever its folder is called.
        model=sources.model.place.source.rstrip("/").rsplit("/", 1)[-1],
        model_digest=sources.model.digest,
        settings=dictionary.train.resolved(features, dictionary.activation, dictionary.tree is not None),
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
    parts, size, what = manifest.compute.sharding.features, 1, "features"
    if settings.tree is not None:
        try:
            require_parents(settings.features, settings.tree)
        except ValueError as error:
            raise ManifestError(f"dictionary {dictionary.name!r}: {error}", "see `tree` in the README") from error
        size, what = settings.tree.size, f"features in subtrees of {settings.tree.size}"
    if settings.features % (parts * size):
        below = settings.features - settings.features % (parts * size)
        raise ManifestError(
            f"dictionary {dictionary.name!r}: {settings.features} {what} cannot be shared evenly by "
            f"compute.sharding.features {parts}",
            f"set features to {below or parts * size} or {below + parts * size}",
        )
    if manifest.corpus is not None and dictionary.train.filter.skip_positions >= manifest.corpus.context:
        raise ManifestError(
            f"dictionary {dictionary.name!r}: train.filter.skip_positions {dictionary.train.filter.skip_positions} "
            f"leaves no row of sequences of {manifest.corpus.context} tokens",
            f"set it below {manifest.corpus.context}",
        )


def estimate(manifest: Manifest, dictionary: Dictionary | None, sources: Sources) -> Estimate:
    """See `Stage.estimate`.

    A rank holds weights and what the optimizer adds to them, and a checkpoint being packed, see `footprint`; three
    slabs (one streamed, one read ahead, one being permuted); and the step: scores of a block of features, candidates,
    the gather, and the tokens of a pass in a few forms. On a GPU are weights, the optimizer's memory and the step.
    """
    assert dictionary is not None
    settings = params(manifest, dictionary, sources)
    width, target = sources.model.widths[dictionary.encoded], sources.model.widths[dictionary.explained]
    layout = planned_layout(manifest.harvest, sources.model.widths, sources.corpus.train_rows)
    read = {dictionary.encoded, dictionary.explained}
    slab = max(layout.geometry.slab_count(0), 1) * (sum(layout.row_bytes(each) for each in read) + 16)
    sample = layout.geometry.slab_count(0) * sum(sources.model.widths[each] for each in read) * 4
    train = settings.settings
    aux = train.auxiliary(width) if settings.tree is None else 0
    sharding = manifest.compute.sharding
    share = train.batch // sharding.data
    # RowAdam's gradient is of the whole batch; dense passes see a part each, and curves all that is explained.
    dense = train.optimizer == "adam"
    tokens = share // manifest.compute.accumulate if dense else train.batch
    active = firing(settings.activation, settings.k, settings.features)
    step = (tokens * (8 * (width + target) + 24 * (active + aux)) + min(tokens, share) * 1024) * 4
    on_card = bool(manifest.compute.gpus)
    step += searching(settings.features // sharding.features, width, tokens, on_card)
    if on_card:
        # Shares of busy features' gradients: a row of each kind for so many entries, at most.
        step += tokens * (active + aux) * 128
    if aux:
        # The encoder rows of what is dead, which may be all.
        step += settings.features // sharding.features * width * (2 if train.weights == "bfloat16" else 4)
    if settings.tree is not None:
        step += descending(settings.tree, settings.features, width, share)
        counters = 64 if settings.tree.rebalance else 32
        step += settings.features * counters
    step += train.batch * 8 * target * 4 if dense and tokens < train.batch else 0
    # Where it begins: rows of the sample, and of a transcoder the means of what it explains.
    start = SAMPLE * (width + target) * 12
    if dictionary.transcode is not None:
        start += settings.features // sharding.features * (width + 3 * target) * 4
    held = footprint(train, manifest.compute, settings.features, width + target)
    steps = -(-settings.settings.tokens // settings.settings.batch)
    rank = RANK_MEMORY + (ZERO_MEMORY if manifest.compute.zero.stage else 0)
    how = f", ZeRO {manifest.compute.zero.stage}" if manifest.compute.zero.stage else ""
    mesh = f", mesh {sharding.features} x {sharding.data}" if sharding.ranks > 1 else ""
    once = rank + 3 * slab + 3 * sample
    return Estimate(
        units=1,
        rows=settings.settings.tokens,
        stored_bytes=held.weights + held.state,
        objects=5,
        memory=once + (held.host if on_card else held.peak + step),
        card=CARD_MEMORY + held.card + max(step, start) if on_card else 0,
        shared=once,
        workers=sharding.ranks,
        gpus=manifest.compute.rank_gpus,
        lost_seconds=manifest.compute.checkpoint_seconds,
        note=f"F {settings.features} (F/d {settings.features / width:g}){_tree(settings)}, k {settings.k}, "
        f"{steps} steps{mesh}{how}",
    )


def _tree(settings: TrainParams) -> str:
    """For people."""
    if settings.tree is None:
        return ""
    return f" in {settings.features // settings.tree.size} subtrees"


def shared(params: TrainParams) -> tuple[object, ...]:
    """What the stream of activations depends on: dictionaries with equal ones see the same batches."""
    settings = params.settings
    return params.hook_point, params.target, settings.seed, settings.batch, settings.filter


def run(inputs: Mapping[str, Committed], params: TrainParams, out: Out) -> Outputs:
    """Train, then commit the dictionary and its curves."""
    (made,) = run_together([Job(inputs, params, out)])
    if isinstance(made, KilobasisError):
        raise made
    return made


def run_together(jobs: Sequence[Job]) -> Sequence[Outputs | KilobasisError]:
    """Train dictionaries with equal `shared` in one pass of the store, by one gang."""
    tasks = [
        TrainTask(
            unit="train",
            harvest=job.inputs["harvest"],
            params=job.params,
            stage=job.out.stage,
            checkpoint_seconds=job.out.compute.checkpoint_seconds,
            feature_ranks=job.out.compute.sharding.features,
            zero=job.out.compute.zero,
            accumulate=job.out.compute.accumulate,
            deterministic=job.out.compute.deterministic,
        )
        for job in jobs
    ]
    out, compute = jobs[0].out, jobs[0].out.compute
    resources = Resources(compute.rank_threads, compute.rank_gpus, together=compute.sharding.features)
    others = [(job.out, task) for job, task in zip(jobs[1:], tasks[1:], strict=True)]
    made: Sequence[Outputs | KilobasisError] = out.gang(
        train_ranks, tasks[0], compute.sharding.ranks, resources, others
    )
    return made


def train_ranks(members: Sequence[Member[TrainTask]], gang: Gang) -> Sequence[Outputs | KilobasisError]:
    """One rank of the gang; rank 0 writes what comes of each dictionary, and says so."""
    first = members[0].task
    settings = first.params.settings
    if first.deterministic:
        parallel.be_deterministic()
    store = open_store(first.harvest)
    read = (first.params.hook_point,) if first.params.target is None else (first.params.hook_point, first.params.target)
    expected = sum(int(first.harvest.facts["hashes"][hook_point], 16) for hook_point in read)
    stream = Stream(store, read, settings.seed, settings.batch, settings.filter, expected)
    wanted = [_wanted(member, store.layout) for member in members]
    made: dict[int, Outputs | KilobasisError] = {}

    def done(index: int, trained: loop.Trained) -> None:
        made[index] = _written(members[index], wanted[index], trained)

    made |= loop.train(wanted, stream, first.checkpoint_seconds, first.feature_ranks, gang, done)
    return [made[index] for index in range(len(members))] if gang.rank == 0 else []


def _wanted(member: Member[TrainTask], layout: StoreLayout) -> loop.Wanted:
    task, settings = member.task, member.task.params.settings
    dense = parallel.Dense(task.zero.stage, task.zero.offload, task.accumulate, settings.weights == "bfloat16")
    of_tree = {} if task.params.tree is None else task.params.tree.model_dump(include={"coarse_weight", "rebalance"})
    return loop.Wanted(task.stage, _config(task.params, layout), settings, member.checkpoints, dense, **of_tree)


def _config(params: TrainParams, layout: StoreLayout) -> DictionaryConfig:
    return DictionaryConfig(
        width=layout.widths[params.hook_point],
        features=params.features,
        k=params.k,
        activation=params.activation,
        prefixes=params.settings.prefixes,
        tree=None if params.tree is None else TreeShape(**params.tree.model_dump(include=set(TreeShape.model_fields))),
        hook_point=params.hook_point,
        target=params.target,
        target_width=None if params.target is None else layout.widths[params.target],
        model=params.model,
        model_digest=params.model_digest,
    )


def _written(member: Member[TrainTask], wanted: loop.Wanted, trained: loop.Trained) -> Outputs:
    """Write a dictionary and its curves."""
    columns = dict(zip(CURVES_SCHEMA.names, zip(*trained.curves, strict=True), strict=True))
    table = pa.Table.from_pydict({name: list(values) for name, values in columns.items()}).cast(CURVES_SCHEMA)
    entries = []

    def write(key: str, body: bytes) -> None:
        create_or_adopt(member.path / key, body)
        entries.append(ObjectEntry.of(key, body))

    for key, body in files(trained.dictionary):
        write(key, body)
    write(DICTIONARY_CONFIG, wanted.shape.model_dump_json(indent=1).encode())
    write(CURVES, parquet_body(table))
    facts: dict[str, Any] = {
        **loop.describe(trained.dictionary, trained.since_fired_F, wanted.settings),
        "steps": trained.progress.step,
        "tokens": trained.progress.tokens,
        "scale": trained.progress.scale,
    }
    return Outputs(objects=tuple(entries), facts=facts)
