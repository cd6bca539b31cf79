"""What is found of worlds with 10^5 and 10^6 known features, by how often each of them fired in training.

    python benchmarks/worlds.py [--quick] [--features M ...] [--only tree|dense ...] [--rows N] [--folder DIR]
                                [--json FILE]

Each world is a manifest like any other, with everything that it leaves out at its default, and `kilobasis run` makes
it: rows, dictionaries with about as many features as the world has, and what is recovered of them. Features fire by
Zipf's law, 16 of them on a row; in half of the worlds four of five of them are in trees, where a child fires only where
its parent does. Nothing is tuned to a world.

A dense dictionary of 10^5 features looks at all of them for every row, and takes that much longer; one of 10^6 is not
trained. There are no marks. What a run has made stays in its folder: start again to go on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import marks
import yaml
from contenders import ROOT
from marks import Fact, fact
from rich.console import Console
from rich.table import Table
from trainings import SCRATCH, kept

NAMES = ("tree", "dense")
# From here on no dense dictionary is trained.
TOO_MANY = 10**6


@dataclass(frozen=True)
class Case:
    """A world, and what is trained on it.

    Attributes:
        features: M, of the world.
        nested: Whether most of them are in trees.
        width: D.
        rows: Of training, each seen once.
        heldout: Rows on which dictionaries are judged.
        children: Of each parent of the tree.
        batch: Rows of a step.
        l0: Features that fire on a row on average, and k.
    """

    features: int
    nested: bool = False
    width: int = 256
    rows: int = 4_000_000
    heldout: int = 50_000
    children: int = 63
    batch: int = 4096
    l0: int = 16

    @property
    def name(self) -> str:
        """For people, and for its folder."""
        return f"{self.features}-{'nested' if self.nested else 'flat'}"

    @property
    def learned(self) -> int:
        """Features of a dictionary: whole subtrees, about as many as the world has."""
        return self.features // (self.children + 1) * (self.children + 1)


def manifest(case: Case, wanted: Sequence[str], root: Path, pool: str) -> dict[str, Any]:
    """What is run."""
    world: dict[str, Any] = {
        "kind": "world", "features": case.features, "width": case.width, "rows": case.rows,
        "heldout_rows": case.heldout, "noise": 0.02, "firing": {"exponent": 1.0, "l0": float(case.l0)},
        "magnitudes": {"mean": 1.0, "std": 0.3},
    }  # fmt: skip
    if case.nested:
        # 21 features for each root.
        world["hierarchy"] = {"roots": case.features // 26, "branching": 4, "depth": 2}
    common = {
        "hook_point": "hidden", "features": case.learned, "k": case.l0, "evaluate": {"tokens": case.heldout},
        # Not what this is about.
        "catalog": {"tokens": 16_384, "report_features": 1000}, "export": [],
    }  # fmt: skip
    train = {"tokens": case.rows, "batch": case.batch, "dead_after": case.rows // 4, "resample": case.rows // 16}
    tree = {"children": case.children, "coarse_k": case.l0 // 2, "routed": case.l0}
    parts = {"tree": {"tree": tree}, "dense": {}}
    return {
        "name": f"world-{case.name}",
        "root": str(root),
        "synthetic": world,
        "dictionaries": [{"name": name, **common, "train": train, **parts[name]} for name in wanted],
        "compute": {"pool": pool, "workers": 2, "threads": 1, "rank_threads": 2},
    }


def run(case: Case, wanted: Sequence[str], folder: Path, pool: str) -> dict[str, dict[str, Any]]:
    """Run what is missing; what evaluation says of each dictionary.

    Raises:
        RuntimeError: the run failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{case.name}.yaml"
    path.write_text(yaml.safe_dump(manifest(case, wanted, folder / case.name, pool), sort_keys=False))
    finished = subprocess.run([sys.executable, "-m", "jobs", "run", str(path)], cwd=ROOT, check=False)
    if finished.returncode:
        raise RuntimeError(f"kilobasis run {path} ended with exit code {finished.returncode}")
    return {name: json.loads(_newest(folder / case.name, name).read_text()) for name in wanted}


def _newest(root: Path, name: str) -> Path:
    """Where the last committed evaluation of a dictionary is."""
    made = root.glob(f"dictionaries/{name}/evaluate/*/COMMITTED.json")
    return max(made, key=lambda path: path.stat().st_mtime).with_name("metrics.json")


def power(row: dict[str, Any]) -> str:
    """How often the features of a row fired.

    >>> power({"fires_from": 100, "fires_below": 1000}), power({"fires_from": 0, "fires_below": 1})
    ('100 to 999', 'never')
    """
    return f"{row['fires_from']:,} to {row['fires_below'] - 1:,}" if row["fires_from"] else "never"


def table(case: Case, told: dict[str, dict[str, Any]]) -> Table:
    """What a person reads."""
    first = next(iter(told.values()))["by_fires"]
    shown = Table(
        title=f"{case.features:,} features in {case.width} dimensions, {'in trees' if case.nested else 'flat'}: "
        f"share found (|cosine| at least 0.9) after {case.rows:,} rows, by fires in training",
        caption=f"dictionaries of {case.learned:,} features, k {case.l0}",
    )
    for heading in ("", *(power(row) for row in first), "F1", "MCC", "FVU", "dead"):
        shown.add_column(heading, justify="right" if heading else "left")
    shown.add_row("features", *(f"{row['features']:,}" for row in first), "", "", "", "")
    for name, each in told.items():
        shown.add_row(
            name,
            *(f"{row['found_90']:.3f}" for row in each["by_fires"]),
            *(f"{each['benchmark'][score]:.3f}" for score in ("f1", "mcc")),
            f"{each['dictionary']['fvu']:.4f}",
            f"{each['dictionary']['dead']:.3f}",
        )
    return shown


def facts(case: Case, told: dict[str, dict[str, Any]]) -> list[Fact]:
    """What a program reads."""
    found = []
    for name, each in told.items():
        config = asdict(case) | {"dictionary": name, "by_fires": each["by_fires"]}
        reached = {"f1": each["benchmark"]["f1"], "mcc": each["benchmark"]["mcc"], "fvu": each["dictionary"]["fvu"]}
        prefix = f"worlds/{case.name}/{name}"
        found += [fact(f"{prefix}/{score}", [value], "fraction", config) for score, value in reached.items()]
    return found


def compare(options: argparse.Namespace, folder: Path, console: Console) -> int:
    """Run every world, and report."""
    found = list[Fact]()
    for features in options.features:
        for nested in (False, True):
            case = Case(features, nested)
            if options.quick:
                case = replace(case, width=32, rows=20_000, heldout=2_000, children=7, batch=256, l0=4)
            case = replace(case, rows=options.rows or case.rows)
            wanted = [name for name in options.only or NAMES if name == "tree" or features < TOO_MANY]
            if wanted:
                told = run(case, wanted, folder, "inline" if options.quick else "ray")
                console.print(table(case, told))
                found += facts(case, told)
            else:
                console.print(f"{features:,} features: too many for a dense dictionary")
            # A long run that is broken off leaves the worlds that it finished.
            marks.write(options.json, found)
    return 0


def main() -> int:
    """Run it; for the exit code see the module."""
    parser = argparse.ArgumentParser(description="What is found of worlds with very many known features.")
    parser.add_argument("--quick", action="store_true", help="tiny worlds, kept in a --folder alone")
    parser.add_argument("--features", type=int, nargs="+", help="of the worlds; 100,000 and 1,000,000 if left out")
    parser.add_argument("--only", choices=NAMES, action="append", help="may be repeated")
    parser.add_argument("--rows", type=int, help="of training; 4,000,000 if left out")
    parser.add_argument("--folder", type=Path, help="keeps what runs have made (runs/benchmarks/worlds)")
    parser.add_argument("--json", type=Path, help="where numbers go")
    options = parser.parse_args()
    options.features = options.features or ([512] if options.quick else [10**5, 10**6])
    console = Console(width=160)
    with kept(options, SCRATCH / "worlds") as folder:
        return compare(options, folder, console)


if __name__ == "__main__":
    sys.exit(main())
