"""What the commit protocol costs: harvest time with it, over harvest time with plain writes.

    python benchmarks/commits.py [--quick] [--json FILE]

Both sides run the stage's own `harvest_unit` on the same units in this process, and take turns unit by unit.
One commits as always: temporary file, fsync, hard link, fsync of the folder, read-back of what is there, the
sealed record of the unit. The other writes each file with a plain `write_bytes`, and its record as well, and
makes sure of nothing. Hashes that are part of the data (crc32c, row hashes, sha256) are computed on both sides.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from unittest import mock

from harvest import QUICK_ROUNDS, QUICK_ROWS, QUICKSTART, Case, Setup, random_model, setup
from rich.console import Console
from rich.table import Table

from cluster.pool import limit_threads
from cluster.storage import create as creating
from cluster.storage.path import StoragePath
from jobs.state import StageFolder, run_unit
from pipeline.harvest import UnitTask, harvest_unit

LIMIT = 0.03
CASES = (
    Case("quickstart", ("gpt_neox.layers.2", "gpt_neox.layers.2.mlp"), rounds=15),
    Case("quickstart-units", ("gpt_neox.layers.2", "gpt_neox.layers.2.mlp"), unit_rows=33336, rounds=15),
)


def _write(target: Path, body: bytes) -> bool:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(body)
    return True


@contextmanager
def plain_writes() -> Iterator[None]:
    """While inside, nothing is made sure of."""
    # Nor does anybody look whether what was written is still there.
    looks = mock.patch("jobs.state.absent", return_value=[])
    with looks, mock.patch.object(creating, "_create_local", _write):
        yield


def seconds(task: UnitTask, out: Path) -> float:
    """Seconds to harvest a unit and commit it."""
    folder = StageFolder(StoragePath.parse(str(out)), "harvest", "0" * 64)
    began = time.perf_counter()
    run_unit(harvest_unit, folder, task)
    return time.perf_counter() - began


def compete(prepared: Setup) -> list[tuple[float, float]]:
    """(seconds with commits, seconds with plain writes) of each round."""
    limit_threads(prepared.case.threads)
    found = []
    for index, task in enumerate(prepared.tasks):
        out = prepared.folder / "out"
        pair: dict[bool, float] = {}
        # Who goes first alternates, so that a drift of the machine favours neither.
        for committed in (bool(index % 2), not index % 2):
            if committed:
                pair[committed] = seconds(task, out)
            else:
                with plain_writes():
                    pair[committed] = seconds(task, out)
            shutil.rmtree(out)
        found.append((pair[True], pair[False]))
    return found[1:]


def main() -> int:
    """Run every case; exit code 1 where the protocol costs more than the limit."""
    parser = argparse.ArgumentParser(description="Share of harvest time that the commit protocol takes.")
    parser.add_argument("--quick", action="store_true", help="small units and few rounds")
    parser.add_argument("--json", type=Path, help="write a list of {name, value, unit, config}")
    options = parser.parse_args()
    found = []
    worst = 0.0
    table = Table(title=f"cost of the commit protocol on a local store, limit {LIMIT:.0%}")
    for heading in ("case", "committed s/unit", "plain s/unit", "cost", "middle half"):
        table.add_column(heading)
    with tempfile.TemporaryDirectory() as scratch:
        model = QUICKSTART
        if not (model / "model.safetensors").is_file():
            model = Path(scratch) / "random"
            random_model(model)
        for case in CASES:
            if options.quick:
                case = Case(case.name, case.hook_points, QUICK_ROWS, QUICK_ROUNDS)
            folder = Path(scratch) / case.name
            folder.mkdir()
            pairs = compete(setup(case, model, folder))
            costs = [committed / plain - 1 for committed, plain in pairs]
            cost = statistics.median(costs)
            worst = max(worst, cost)
            low, _, high = statistics.quantiles(costs, n=4)
            committed, plain = (statistics.median(side) for side in zip(*pairs, strict=True))
            table.add_row(case.name, f"{committed:.3f}", f"{plain:.3f}", f"{cost:+.1%}", f"{low:+.1%}..{high:+.1%}")
            config = asdict(case) | {"per_round": costs}
            found += [
                {"name": f"commits/{case.name}/seconds", "value": committed, "unit": "s", "config": config},
                {
                    "name": f"commits/{case.name}/ratio",
                    "value": 1 + cost,
                    "unit": "committed / plain",
                    "config": config,
                },
            ]
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if worst <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
