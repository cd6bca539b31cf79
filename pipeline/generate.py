"""generate: the harvest of a synthetic source, whose true features are known.

It stands in harvest's place, under its name, and leaves the same store: units of consecutive rows, permuted and written
as one shard per array. Token ids are -1 and positions 0, since there is no text. First of all what takes time to make
and is the same for all rows is made and kept: toy models, and directions that are pushed apart. Every unit also counts
how often each known feature fired in it, because recovery is judged against that.

The first unit is the canary: rows of it are made again from their true code alone, the plain way, and must agree with
what a reader gets back from the encoded shard.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import safetensors.torch
import torch

from cluster.pool import Resources
from cluster.storage.create import create_or_adopt
from cluster.storage.formats import read_table
from cluster.storage.objects import read_recorded
from cluster.storage.path import StoragePath
from cluster.storage.zarr_store import metadata
from pipeline.activations.layout import FILL_INDEX, StoreLayout, choose_layout, planned_layout
from pipeline.activations.write import ROUNDING, read_back, write_unit
from pipeline.stage import Committed, CorpusFacts, Estimate, ModelFacts, Out, Params, Sources, Task
from pipeline.synthetic import toy
from pipeline.synthetic.directions import pushed_apart, random_directions
from pipeline.synthetic.draws import BLOCK_ROWS, Split
from pipeline.synthetic.rows import Block, rows
from pipeline.synthetic.source import identity, is_kept, of_identity, open_source
from pipeline.tokenize import parquet_body
from schemas.errors import IntegrityError, StageFailedError
from schemas.events import Note
from schemas.layouts import FIRES, STORE, STORE_HASHES, STORE_OBJECTS, array_name, shard_key, truth_key
from schemas.manifest import Dictionary, Manifest, Model
from schemas.records import ObjectEntry, Outputs, Unit, canonical_json, sha256
from schemas.synthetic import Toy, World
from schemas.tables import STORE_HASHES as STORE_HASHES_SCHEMA
from schemas.tables import UNIT_FIRES

CANARY_ROWS = 8

# Measured: a worker that has imported torch, transformers, zarr and pyarrow.
WORKER_MEMORY = 750 * 2**20


class GenerateParams(Params):
    """Identity of a synthetic harvest."""

    source: dict[str, Any]
    rows: int
    widths: dict[str, int]
    dtype: str
    unit_rows: int | None
    chunk_rows: int | None
    loader_memory: int
    seed: int


class TruthTask(Task):
    """What is the same for all rows of a hook point."""

    hook_point: str
    params: GenerateParams


class UnitTask(Task):
    """One unit of rows."""

    index: int
    layout: StoreLayout
    kept: dict[str, ObjectEntry]
    params: GenerateParams


def known_sources(section: World | Toy, hook_points: tuple[str, ...]) -> Sources:
    """A synthetic source as planning sees model and corpus: nothing needs to be looked at."""
    name = section.model if isinstance(section, Toy) else "world"
    model = ModelFacts(
        place=Model(source=f"synthetic-{name}"),
        digest=sha256(canonical_json(identity(section))),
        tokenizer_digest="",
        parameters=0,
        vocabulary=0,
        max_context=None,
        widths={hook_point: section.widths[hook_point] for hook_point in hook_points},
        last_hook_point=hook_points[-1],
        is_causal_lm=False,
        has_bos=False,
    )
    corpus = CorpusFacts((), 0, train_rows=section.rows, heldout_rows=section.heldout_rows, exact=True)
    return Sources(model, corpus)


def params(manifest: Manifest, _dictionary: Dictionary | None, sources: Sources) -> GenerateParams:
    """See `Stage.params`."""
    assert manifest.synthetic is not None
    return GenerateParams(
        **manifest.harvest.model_dump(exclude={"hook_points", "tokens", "batch_tokens"}),
        source=identity(manifest.synthetic),
        rows=manifest.synthetic.rows,
        widths=dict(sources.model.widths),
    )


def check(manifest: Manifest, _dictionary: Dictionary | None, sources: Sources) -> None:
    """Refuse a cut that cannot work."""
    planned_layout(manifest.harvest, sources.model.widths, sources.corpus.train_rows)


def estimate(manifest: Manifest, _dictionary: Dictionary | None, sources: Sources) -> Estimate:
    """See `Stage.estimate`. A worker holds the true directions, one unit, and the true code of a few blocks of rows."""
    section = manifest.synthetic
    assert section is not None
    layout = planned_layout(manifest.harvest, sources.model.widths, sources.corpus.train_rows)
    cut, widths = layout.geometry, sum(layout.widths.values())
    stored = sum(layout.row_bytes(hook_point) + 4 for hook_point in layout.widths) + 16
    directions = truth_bytes(section)
    kept = directions * len(layout.widths) if is_kept(section) else 0
    # Pushing apart holds directions, their gradient, both moments and a product; a read holds them twice.
    truth = directions * (6 if is_kept(section) and isinstance(section, World) else 2)
    code = BLOCK_ROWS * (64 * 1024 if isinstance(section, World) else section.features * 64)
    return Estimate(
        units=cut.units + (len(layout.widths) if kept else 0),
        rows=layout.rows,
        stored_bytes=cut.units * cut.unit_rows * stored + kept,
        objects=cut.units * (2 * len(layout.widths) + 5) + 3 * len(layout.widths) + 7,
        memory=WORKER_MEMORY + truth + code + section.features * 64 + cut.unit_rows * (widths * 4 + 3 * stored),
        workers=manifest.compute.workers,
        note=f"{cut.units} units of {cut.unit_rows} rows, {cut.slabs} slabs of {layout.rows // cut.slabs} rows",
    )


def truth_bytes(section: World | Toy) -> int:
    """Bytes of one hook point's true directions."""
    width = next(iter(section.widths.values()))
    return section.features * width * 4 * (2 if isinstance(section, Toy) else 1)


def run(_inputs: Mapping[str, Committed], params: GenerateParams, out: Out) -> Outputs:
    """Make what is kept, then every unit. The canary's unit goes first and alone."""
    section = of_identity(params.source)
    layout = choose_layout(
        params.rows,
        params.widths,
        params.dtype,
        params.seed,
        params.loader_memory,
        params.unit_rows,
        params.chunk_rows,
    )
    resources = Resources(threads=out.compute.threads)
    truths = {
        hook_point: TruthTask(unit=f"truth-{array_name(hook_point)}", hook_point=hook_point, params=params)
        for hook_point in (layout.widths if is_kept(section) else ())
    }
    made = out.map(make_truth, list(truths.values()), resources)
    kept = {hook_point: made[task.unit].made.objects[0] for hook_point, task in truths.items()}
    described = [
        out.write(f"{STORE}/{key}", body) for key, body in metadata(layout.arrays(), layout.attributes()).items()
    ]
    tasks = [
        UnitTask(unit=f"{index:06d}", index=index, layout=layout, kept=kept, params=params)
        for index in range(layout.geometry.units)
    ]
    records = out.map(make_unit, tasks[:1], resources)
    canary = records[tasks[0].unit].made.facts["canary"]
    for hook_point, worst in canary.items():
        out.emit(Note(out.stage, f"{hook_point}: stored rows agree with their true code to {worst:.2%}"))
    records |= out.map(make_unit, tasks, resources)
    units = {unit: records[unit].made for unit in sorted(records)}
    total = sum(unit.rows for unit in units.values())
    if total != layout.rows:
        raise IntegrityError(f"harvest made {total} rows, expected {layout.rows}", "delete the harvest's folder")
    entries = [entry for unit in units.values() for entry in unit.objects if entry.key.startswith(f"{STORE}/")]
    listing = [entry.model_dump() for entry in (*entries, *described)]
    chunks = [
        {"unit": int(name), "hook_point": hook_point, "sums": [int(each, 16) for each in sums]}
        for name, unit in units.items()
        for hook_point, sums in sorted(unit.facts["chunks"].items())
    ]
    hashes = {
        hook_point: sum(int(unit.facts["hashes"][hook_point], 16) for unit in units.values()) % 2**64
        for hook_point in layout.widths
    }
    return Outputs(
        objects=(
            *described,
            out.write(STORE_OBJECTS, parquet_body(pa.Table.from_pylist(listing))),
            out.write(STORE_HASHES, parquet_body(pa.Table.from_pylist(chunks, STORE_HASHES_SCHEMA))),
            out.write(FIRES, safetensors.torch.save(_fires(out.path, list(units.values()), layout, section))),
        ),
        facts={
            "layout": layout.model_dump(mode="json"),
            "hashes": {hook_point: f"{value:016x}" for hook_point, value in hashes.items()},
            "canary": canary,
            "source": params.source,
            "kept": {hook_point: entry.model_dump(mode="json") for hook_point, entry in kept.items()},
            "toys": [made[task.unit].made.facts["toy"] for task in truths.values() if isinstance(section, Toy)],
        },
    )


def make_truth(task: TruthTask, path: StoragePath) -> Unit:
    """Train a hook point's toy model, or push its directions apart."""
    section, facts = of_identity(task.params.source), dict[str, Any]()
    if isinstance(section, Toy):
        tensors, loss = toy.train(section, task.hook_point)
        facts["toy"] = toy.figure(section, task.hook_point, tensors, loss)
    else:
        random_FD = random_directions(section.features, section.width, section.seed)
        settings = section.interference
        tensors = {"directions": pushed_apart(random_FD, settings.steps, settings.learning_rate)}
    body = safetensors.torch.save(tensors)
    create_or_adopt(path / truth_key(task.hook_point), body)
    return Unit(objects=(ObjectEntry.of(truth_key(task.hook_point), body),), facts=facts)


def make_unit(task: UnitTask, path: StoragePath) -> Unit:
    """Make a unit's rows, write its shards, and count what fired.

    Raises:
        NonFiniteError: a row is NaN or infinite.
        StageFailedError: the canary found a difference.
    """
    section, layout = of_identity(task.params.source), task.layout
    first, end = layout.geometry.span(task.index)
    made: dict[str, Block] = {}
    for hook_point in layout.widths:
        source = open_source(section, hook_point, path, task.kept.get(hook_point))
        made[hook_point] = rows(source, Split.TRAIN, first, end)
    nothing_N = np.full(end - first, FILL_INDEX, np.int32)
    activations = {hook_point: block.x_ND for hook_point, block in made.items()}
    unit = write_unit(path, layout, task.index, activations, nothing_N, np.zeros(end - first, np.int32))
    counted = []
    for hook_point, block in made.items():
        features, fires = np.unique(block.active.feature_E, return_counts=True)
        columns = {"hook_point": [hook_point] * len(features), "feature": features, "fires": fires}
        counted.append(pa.Table.from_pydict(columns, UNIT_FIRES))
    key, body = f"fires/{task.unit}.parquet", parquet_body(pa.concat_tables(counted))
    create_or_adopt(path / key, body)
    facts = dict(unit.facts)
    if task.index == 0:
        facts["canary"] = {hook_point: compare_plainly(task, hook_point, unit, path) for hook_point in made}
    return unit.model_copy(update={"objects": (*unit.objects, ObjectEntry.of(key, body)), "facts": facts})


def compare_plainly(task: UnitTask, hook_point: str, unit: Unit, path: StoragePath) -> float:
    """The canary: stored rows against the same rows, made again from nothing and worked out from their true code.

    Returns:
        Largest difference, relative to the row's largest value.

    Raises:
        StageFailedError: they differ by more than rounding, and the noise of a noisy world, explain.
    """
    layout = task.layout
    source = open_source(of_identity(task.params.source), hook_point, path, task.kept.get(hook_point))
    (entry,) = [each for each in unit.objects if each.key == shard_key(array_name(hook_point), 0, 2)]
    chosen = np.arange(0, unit.rows, -(-unit.rows // CANARY_ROWS))
    stored_ND = read_back(layout, 0, hook_point, read_recorded(path, entry), chosen)
    plain_ND = torch.cat([source.plain(rows(source, Split.TRAIN, row, row + 1).active) for row in chosen.tolist()])
    scale_N1 = plain_ND.abs().amax(dim=1, keepdim=True).clamp_min(1e-6)
    difference_ND = ((stored_ND - plain_ND).abs() - 8.0 * source.noise).clamp_min(0.0)
    worst, allowed = float((difference_ND / scale_N1).max()), ROUNDING[layout.dtype]
    if not worst <= allowed:
        raise StageFailedError(
            f"harvest: the canary found stored rows of {hook_point!r} that differ from their true code by {worst:.3g} "
            f"of the row's largest value, at most {allowed:.3g} is rounding",
            "look at the machine: the same sum came out twice, differently",
        )
    return round(worst, 4)


def _fires(path: StoragePath, units: list[Unit], layout: StoreLayout, section: World | Toy) -> dict[str, torch.Tensor]:
    """How often each known feature fired in the training split, by hook point."""
    known = section.features * (2 if isinstance(section, Toy) and section.model == "absolute_value" else 1)
    total = {hook_point: np.zeros(known, np.int64) for hook_point in layout.widths}
    for unit in units:
        (entry,) = [each for each in unit.objects if each.key.startswith("fires/")]
        table = read_table(path, entry, UNIT_FIRES)
        for hook_point, fires_M in total.items():
            of_it = table.filter(pa.compute.equal(table["hook_point"], hook_point))
            fires_M[of_it["feature"].to_numpy()] += of_it["fires"].to_numpy()
    return {hook_point: torch.from_numpy(fires_M) for hook_point, fires_M in total.items()}
