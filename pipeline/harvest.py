"""harvest: the model runs over the training split, and every hook point's rows go into one sharded store.

A unit is `unit_rows` consecutive token rows of the corpus. Its worker runs the sequences that touch it,
permutes the rows and writes one shard per array. A sequence across a border is run by both neighbours,
so that units stay independent.

The first unit is also the canary: some of its sequences are run again, plainly, one at a time and
without stopping early, and must agree with what a reader gets back from the encoded shard.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from pydantic import Field

from cluster.pool import Resources
from cluster.storage.objects import read_recorded
from cluster.storage.path import StoragePath
from cluster.storage.zarr_store import metadata
from pipeline.activations.layout import StoreLayout, choose_layout
from pipeline.activations.write import ROUNDING, read_back, write_unit
from pipeline.device import CARD_MEMORY
from pipeline.sources import models
from pipeline.sources.forward import Forward
from pipeline.sources.hooks import capture
from pipeline.sources.sequences import Piece, TokenSequence, batches, overlapping, padded, pieces, read
from pipeline.stage import Committed, Estimate, Out, Params, Sources, Task
from pipeline.tokenize import parquet_body
from schemas.errors import IntegrityError, StageFailedError
from schemas.events import Note
from schemas.layouts import STORE, STORE_HASHES, STORE_OBJECTS, array_name, shard_key
from schemas.manifest import Dictionary, Manifest, Model
from schemas.records import Outputs, Unit
from schemas.tables import STORE_HASHES as STORE_HASHES_SCHEMA

CANARY_SEQUENCES = 2

# Measured: a worker that has imported torch, transformers, zarr and pyarrow.
WORKER_MEMORY = 750 * 2**20


class HarvestParams(Params):
    """Identity of a harvest."""

    model_digest: str
    model_dtype: str
    widths: dict[str, int]
    last_hook_point: str
    tokens: int | None
    dtype: str
    batch_tokens: int
    unit_rows: int | None
    chunk_rows: int | None
    loader_memory: int
    seed: int
    model: Model = Field(exclude=True)


class UnitTask(Task):
    """One unit: which rows, and where their tokens are."""

    index: int
    layout: StoreLayout
    pieces: tuple[Piece, ...]
    tokens: StoragePath
    params: HarvestParams
    gpus: float = 0.0


def params(manifest: Manifest, _dictionary: Dictionary | None, sources: Sources) -> HarvestParams:
    """See `Stage.params`."""
    section = manifest.harvest
    assert manifest.model is not None
    return HarvestParams(
        **section.model_dump(exclude={"hook_points"}),
        widths=dict(sources.model.widths),
        last_hook_point=sources.model.last_hook_point,
        model_digest=sources.model.digest,
        model_dtype=manifest.model.dtype,
        model=sources.model.place,
    )


def store_layout(settings: HarvestParams, train_rows: int) -> StoreLayout:
    """The store that a training split of `train_rows` rows gets.

    Raises:
        ManifestError: slabs that fit the loader are not possible.
    """
    rows = min(train_rows, settings.tokens or train_rows)
    return choose_layout(
        rows,
        settings.widths,
        settings.dtype,
        settings.seed,
        settings.loader_memory,
        settings.unit_rows,
        settings.chunk_rows,
    )


def check(manifest: Manifest, dictionary: Dictionary | None, sources: Sources) -> None:
    """Refuse a cut that cannot work."""
    store_layout(params(manifest, dictionary, sources), sources.corpus.train_rows)


def estimate(manifest: Manifest, dictionary: Dictionary | None, sources: Sources) -> Estimate:
    """See `Stage.estimate`. A worker holds the model twice while loading, one batch and one unit."""
    assert manifest.corpus is not None
    layout = store_layout(params(manifest, dictionary, sources), sources.corpus.train_rows)
    cut, model = layout.geometry, sources.model
    stored = sum(layout.row_bytes(hook_point) + 4 for hook_point in layout.widths) + 16
    widths = sum(layout.widths.values())
    unit = cut.unit_rows * (widths * 4 + 3 * stored)
    # The widest things of a forward pass are the MLP and attention of one block; logits are never made.
    batch = manifest.harvest.batch_tokens * max(layout.widths.values()) * 4 * 24
    attention = manifest.harvest.batch_tokens * manifest.corpus.context * 4 * 16
    return Estimate(
        units=cut.units,
        rows=layout.rows,
        stored_bytes=cut.units * cut.unit_rows * stored,
        objects=cut.units * (2 * len(layout.widths) + 4) + 2 * len(layout.widths) + 6,
        memory=WORKER_MEMORY + model.parameters * 8 + unit + (0 if manifest.compute.gpus else batch + attention),
        workers=manifest.compute.workers,
        gpus=manifest.compute.gpus,
        card=CARD_MEMORY + model.parameters * 4 + batch + attention if manifest.compute.gpus else 0,
        note=f"{cut.units} units of {cut.unit_rows} rows, {cut.slabs} slabs of {layout.rows // cut.slabs} rows",
    )


def run(inputs: Mapping[str, Committed], params: HarvestParams, out: Out) -> Outputs:
    """Harvest every unit. The canary's unit goes first and alone."""
    tokens = inputs["tokenize"]
    layout = store_layout(params, tokens.facts["train_rows"])
    described = []
    for key, body in metadata(layout.arrays(), layout.attributes()).items():
        described.append(out.write(f"{STORE}/{key}", body))
    every = pieces(tokens, "train")
    tasks = [
        UnitTask(
            unit=f"{index:06d}",
            index=index,
            layout=layout,
            pieces=overlapping(every, *layout.geometry.span(index)),
            tokens=tokens.path,
            params=params,
            gpus=out.compute.gpus,
        )
        for index in range(layout.geometry.units)
    ]
    resources = Resources(threads=out.compute.threads, gpus=out.compute.gpus)
    records = out.map(harvest_unit, tasks[:1], resources)
    for hook_point, worst in records[tasks[0].unit].made.facts["canary"].items():
        out.emit(Note(out.stage, f"{hook_point}: stored rows agree with a plain forward pass to {worst:.2%}"))
    records |= out.map(harvest_unit, tasks, resources)
    rows = sum(record.made.rows for record in records.values())
    if rows != layout.rows:
        raise IntegrityError(f"harvest made {rows} rows, expected {layout.rows}", "delete the harvest's folder")
    entries = [entry for unit in sorted(records) for entry in records[unit].made.objects] + described
    listing = out.write(STORE_OBJECTS, parquet_body(pa.Table.from_pylist([entry.model_dump() for entry in entries])))
    chunks = [
        {"unit": int(unit), "hook_point": hook_point, "sums": [int(each, 16) for each in sums]}
        for unit in sorted(records)
        for hook_point, sums in sorted(records[unit].made.facts["chunks"].items())
    ]
    hashed = out.write(STORE_HASHES, parquet_body(pa.Table.from_pylist(chunks, STORE_HASHES_SCHEMA)))
    hashes = {
        hook_point: sum(int(record.made.facts["hashes"][hook_point], 16) for record in records.values()) % 2**64
        for hook_point in layout.widths
    }
    return Outputs(
        objects=(*described, listing, hashed),
        facts={
            "layout": layout.model_dump(mode="json"),
            "hashes": {hook_point: f"{value:016x}" for hook_point, value in hashes.items()},
            "canary": records["000000"].made.facts["canary"],
        },
    )


def harvest_unit(task: UnitTask, path: StoragePath) -> Unit:
    """Run the model over one unit's sequences and write its shards.

    Raises:
        NonFiniteError: an activation is NaN or infinite.
        StageFailedError: the canary found a difference.
    """
    settings, layout = task.params, task.layout
    loaded = models.load(settings.model, task.gpus)
    first, end = layout.geometry.span(task.index)
    sequences = read(task.tokens, task.pieces, first, end)
    activations, tokens_N, positions_N = forward_rows(loaded, sequences, layout, settings, first, end)
    unit = write_unit(path, layout, task.index, activations, tokens_N, positions_N)
    if task.index:
        return unit
    canary = compare_plainly(loaded, sequences, layout, settings, unit, path)
    return unit.model_copy(update={"facts": {**unit.facts, "canary": canary}})


def forward_rows(
    loaded: models.Loaded,
    sequences: list[TokenSequence],
    layout: StoreLayout,
    settings: HarvestParams,
    first: int,
    end: int,
) -> tuple[dict[str, torch.Tensor], npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Rows [first, end) of every hook point in corpus order, with their tokens and positions."""
    count = end - first
    rows_ND = {hook_point: torch.empty((count, width)) for hook_point, width in layout.widths.items()}
    tokens_N, positions_N = np.empty(count, np.int32), np.empty(count, np.int32)
    forward = Forward(loaded, list(layout.widths), stop_at=settings.last_hook_point)
    with torch.inference_mode():
        for part, seen in chain.from_iterable(map(forward, batches(sequences, settings.batch_tokens))):
            for index, sequence in enumerate(part):
                # A sequence across the unit's border gives only the rows inside.
                start = max(0, first - sequence.first_row)
                stop = min(len(sequence), end - sequence.first_row)
                into = slice(sequence.first_row + start - first, sequence.first_row + stop - first)
                tokens_N[into] = sequence.tokens[start:stop]
                positions_N[into] = np.arange(start, stop)
                for hook_point, x_BSD in seen.items():
                    rows_ND[hook_point][into] = x_BSD[index, start:stop].float()
    return rows_ND, tokens_N, positions_N


def compare_plainly(
    loaded: models.Loaded,
    sequences: list[TokenSequence],
    layout: StoreLayout,
    settings: HarvestParams,
    unit: Unit,
    path: StoragePath,
) -> dict[str, Any]:
    """The canary: stored rows against a plain forward pass of single sequences.

    Returns:
        Largest difference per hook point, relative to the row's largest value.

    Raises:
        StageFailedError: they differ by more than rounding explains.
    """
    _, end = layout.geometry.span(0)
    chosen = sequences[:: max(1, len(sequences) // CANARY_SEQUENCES)][:CANARY_SEQUENCES]
    tolerance = max(ROUNDING[layout.dtype], ROUNDING[settings.model_dtype])
    worst: dict[str, Any] = {}
    for hook_point in layout.widths:
        key = shard_key(array_name(hook_point), 0, 2)
        (entry,) = [each for each in unit.objects if each.key == key]
        body = read_recorded(path, entry)
        for sequence in chosen:
            rows = np.arange(sequence.first_row, min(sequence.first_row + len(sequence), end))
            with torch.inference_mode():
                inputs = loaded.placed(padded([sequence]))
                plain_ND = capture(loaded.model, [hook_point], inputs)[hook_point][0, : len(rows)].float().cpu()
            stored_ND = read_back(layout, 0, hook_point, body, rows)
            scale_N1 = plain_ND.abs().amax(dim=1, keepdim=True).clamp_min(1e-6)
            difference = float(((stored_ND - plain_ND).abs() / scale_N1).max())
            worst[hook_point] = max(worst.get(hook_point, 0.0), difference)
            if not difference <= tolerance:
                raise StageFailedError(
                    f"harvest: the canary found stored rows of {hook_point!r} that differ from a plain forward pass "
                    f"by {difference:.3g} of the row's largest value, at most {tolerance:.3g} is rounding",
                    "the model may be nondeterministic or depend on its batch; try model.dtype: float32",
                )
    return {hook_point: round(value, 4) for hook_point, value in worst.items()}
