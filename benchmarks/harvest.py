"""Harvest speed beside a bare forward loop: what hooks, permuting, hashing, encoding and writing cost.

    python benchmarks/harvest.py [--quick] [--model FOLDER] [--json FILE]

Both sides run in this process, with the same threads, over the same sequences in the same batches, and
take turns unit by unit. The harvest is the stage's own `harvest_unit`: it reads the tokens, runs the model
with hooks, and writes the unit's shards to a local folder. The bare loop is the model without its head,
all layers, under inference mode; nothing is watched and nothing is kept. A harvest stops behind its last
hook point, so one of an early layer can be the faster one; `last-layer` has no such help.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from rich.console import Console
from rich.table import Table
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from cluster.pool import limit_threads
from cluster.storage.path import StoragePath
from pipeline.harvest import HarvestParams, UnitTask, harvest_unit, store_layout
from pipeline.sources import models
from pipeline.sources.sequences import Piece, TokenSequence, batches, overlapping, padded, read
from pipeline.tokenize import GROUP_SEQUENCES, parquet_body
from schemas.manifest import Harvest, Model
from schemas.records import ObjectEntry
from schemas.tables import TOKENS

QUICKSTART = Path(__file__).resolve().parent.parent / "jobs" / "manifests" / "quickstart" / "neox-stdlib"
TARGET = 0.85
SEED = 0


@dataclass(frozen=True)
class Case:
    """What is harvested. `rounds` units are timed, after one that is not."""

    name: str
    hook_points: tuple[str, ...]
    unit_rows: int = 2**16
    rounds: int = 7
    threads: int = 1
    context: int = 256
    dtype: str = "bfloat16"


CASES = (
    Case("quickstart", ("gpt_neox.layers.2", "gpt_neox.layers.2.mlp")),
    Case("last-layer", ("gpt_neox.layers.3",)),
)
QUICK_ROWS, QUICK_ROUNDS = 2**14, 3


@dataclass(frozen=True)
class Setup:
    """Everything that both sides need."""

    case: Case
    folder: Path
    params: HarvestParams
    tasks: tuple[UnitTask, ...]


def random_model(folder: Path) -> None:
    """A model of the quickstart's shape with random weights: they do not change what a forward pass costs."""
    torch.manual_seed(SEED)
    config = GPTNeoXConfig(
        vocab_size=2048,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=256,
        use_parallel_residual=False,
    )
    GPTNeoXForCausalLM(config).save_pretrained(folder)


def write_tokens(path: Path, rows: int, case: Case, vocabulary: int) -> list[Piece]:
    """A token file as tokenize writes it, with at least `rows` rows of random tokens.

    Documents are of log-normal length and cut into sequences of `context`, so that, as in a real corpus,
    most sequences are full and some are short.
    """
    random = np.random.default_rng(SEED)
    sequences: list[Any] = []
    count = 0
    while count < rows:
        length = max(8, int(random.lognormal(7.0, 1.2)))
        tokens = random.integers(0, vocabulary, length, dtype=np.int32)
        sequences += [tokens[start : start + case.context] for start in range(0, length, case.context)]
        count += length
    zeros = [0] * len(sequences)
    table = pa.Table.from_pydict({"document": zeros, "offset": zeros, "tokens": sequences}, TOKENS)
    body = parquet_body(table, GROUP_SEQUENCES)
    path.write_bytes(body)
    file = ObjectEntry.of(path.name, body)
    found, first = [], 0
    for group, start in enumerate(range(0, len(sequences), GROUP_SEQUENCES)):
        held = sum(len(tokens) for tokens in sequences[start : start + GROUP_SEQUENCES])
        found.append(Piece(file=file, row_group=group, first_row=first, rows=held))
        first += held
    return found


def setup(case: Case, model: Path, folder: Path) -> Setup:
    """Write the tokens and cut them into units. One unit more than rounds: the first only warms up."""
    section = Harvest(hook_points=case.hook_points, dtype=case.dtype, unit_rows=case.unit_rows, seed=SEED)  # type: ignore[arg-type]
    facts = models.inspect(Model(source=str(model)), case.hook_points)
    params = HarvestParams(
        **section.model_dump(exclude={"hook_points"}),
        widths=dict(facts.widths),
        last_hook_point=facts.last_hook_point,
        model_digest=facts.digest,
        model_dtype="float32",
        model=facts.place,
    )
    # Unit 0 carries the canary, which belongs to no other; it is left out.
    units = range(1, case.rounds + 2)
    rows = case.unit_rows * (case.rounds + 2)
    pieces = write_tokens(folder / "tokens.parquet", rows, case, facts.vocabulary)
    layout = store_layout(params, rows)
    tasks = tuple(
        UnitTask(
            unit=f"{unit:06d}",
            index=unit,
            layout=layout,
            pieces=overlapping(pieces, *layout.geometry.span(unit)),
            tokens=StoragePath.parse(str(folder)),
            params=params,
        )
        for unit in units
    )
    return Setup(case, folder, params, tasks)


def bare(model: torch.nn.Module, sequences: Sequence[TokenSequence], batch_tokens: int) -> float:
    """Seconds of a plain forward loop."""
    began = time.perf_counter()
    with torch.inference_mode():
        for batch in batches(sequences, batch_tokens):
            model(**padded(batch))
    return time.perf_counter() - began


def harvested(task: UnitTask, out: Path) -> float:
    """Seconds of the stage's own work on a unit."""
    began = time.perf_counter()
    harvest_unit(task, StoragePath.parse(str(out)))
    return time.perf_counter() - began


def compete(prepared: Setup) -> list[tuple[float, float]]:
    """(rows/s of the harvest, rows/s of the bare loop) of each round."""
    limit_threads(prepared.case.threads)
    params = prepared.params
    loaded = models.load(params.model).model
    base: torch.nn.Module = loaded.base_model  # type: ignore[assignment]
    rates = []
    for index, task in enumerate(prepared.tasks):
        first, end = task.layout.geometry.span(task.index)
        sequences = read(task.tokens, task.pieces, first, end)
        out = prepared.folder / "out"
        # Who goes first alternates, so that a drift of the machine favours neither.
        if index % 2:
            plain = bare(base, sequences, params.batch_tokens)
            ours = harvested(task, out)
        else:
            ours = harvested(task, out)
            plain = bare(base, sequences, params.batch_tokens)
        shutil.rmtree(out)
        # Both ran the whole sequences at the unit's ends; rows/s counts the rows that are kept.
        rates.append(((end - first) / ours, (end - first) / plain))
    return rates[1:]


def facts(case: Case, model: str, rates: list[tuple[float, float]]) -> list[dict[str, Any]]:
    """What a program reads."""
    ratios = [ours / plain for ours, plain in rates]
    config = asdict(case) | {"model": model}
    values = (
        ("rows_per_s", [ours for ours, _ in rates], "rows/s"),
        ("bare_rows_per_s", [plain for _, plain in rates], "rows/s"),
        ("ratio", ratios, "harvest / bare forward loop"),
    )
    return [
        {
            "name": f"harvest/{case.name}/{what}",
            "value": statistics.median(per_round),
            "unit": unit,
            "config": config | {"per_round": per_round},
        }
        for what, per_round, unit in values
    ]


def main() -> int:
    """Run every case; exit code 1 where the ratio is below the target."""
    parser = argparse.ArgumentParser(description="Harvest rows/s over those of a bare forward loop.")
    parser.add_argument("--quick", action="store_true", help="small units and few rounds")
    parser.add_argument("--model", type=Path, default=QUICKSTART, help="a GPT-NeoX folder; random if it is not there")
    parser.add_argument("--json", type=Path, help="write a list of {name, value, unit, config}")
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    worst = 1.0
    with tempfile.TemporaryDirectory() as scratch:
        model = options.model
        if not (model / "model.safetensors").is_file():
            model = Path(scratch) / "random"
            random_model(model)
        table = Table(title=f"harvest over a bare forward loop of {model.name}, target {TARGET:.2f}")
        for heading in ("case", "hook points", "rows/s", "bare rows/s", "ratio", "min..max"):
            table.add_column(heading)
        for case in CASES:
            if options.quick:
                case = Case(case.name, case.hook_points, QUICK_ROWS, QUICK_ROUNDS)
            folder = Path(scratch) / case.name
            folder.mkdir()
            rates = compete(setup(case, model, folder))
            rows, plain, ratio = made = facts(case, model.name, rates)
            found += made
            spread = ratio["config"]["per_round"]
            worst = min(worst, ratio["value"])
            table.add_row(
                case.name,
                " ".join(case.hook_points),
                f"{rows['value']:,.0f}",
                f"{plain['value']:,.0f}",
                f"{ratio['value']:.2f}",
                f"{min(spread):.2f}..{max(spread):.2f}",
            )
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if worst >= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
