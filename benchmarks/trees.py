"""What a tree is worth: held-out error at a thousand times more features than dimensions, and what each part adds.

    python benchmarks/trees.py [--quick] [--hook NAME ...] [--only NAME ...] [--rates R ...] [--seeds N ...]
                               [--device cuda --jobs N] [--json FILE]

On activations of two hook points of the quickstart's model (see `quality.py`, same definitions of FVU and dead), the
same tokens in the same order and the same k for everybody:

- `tree`: 1024 D features; 16 D parents, of which half of k fire, and whose children are searched.
- `tree-routed`: children of twice as many parents are searched. `tree-slim`: 8 D parents, a quarter of k.
- `tree-balanced`: hot children and cold parents exchange places (`tree.rebalance`).
- `dense-128`, `dense-1024`: exact TopK of so many times D features.
- `random-routes`: parents fire as ever, but tokens are routed by random directions that nobody trains.
- `no-residual`: children encode what parents encode, not what those leave.
- `switch`: one parent of D a token, and all but one of k are children of it, as a router with one expert has it.
- `product-keys`: a feature is a pair of half keys, and so is its search (see `peers/product_keys_run.py`).

Learning rates are searched for each on the first seed: from `--rates` times the manifest's default, and on beyond an
end as long as that end is the best. `ratio` is the FVU over the tree's of the same seed; above 1 the tree is better.
Every run is kept as soon as it ends (see `trainings.py`): start again to go on.

Marks: the best tree's FVU below that of `dense-128`, and at most 1.05 times that of `dense-1024`; exit code 1 where one
is missed, or where a tree fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import marks
import rows
import trainings
from contenders import OURS, Contender
from marks import Fact, Mark, fact, spread
from quality import EXTRA, QUICK_CORPUS, Standing, best_rate, search
from rich.console import Console
from rich.table import Table
from rows import Harvested
from trainings import Bench, Plan, Result

HOOKS = ("gpt_neox.layers.2", "gpt_neox.layers.2.mlp")
RATES, SEEDS = (0.5, 1.0, 2.0), (0, 1, 2)
BELOW, WITHIN = 1.0, 1.05
TREE = "tree"
# What would score every dead feature for every token is nothing for so many: they start again instead.
MANY = {"aux_k": 0}


@dataclass(frozen=True)
class Entrant:
    """Who, how many times more features than dimensions, and what of the manifest's `train` differs."""

    contender: Contender
    expansion: int = 1024
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """How it is called."""
        return self.contender.name

    @property
    def is_tree(self) -> bool:
        """Whether it is one that a manifest may ask for as it is, and that a mark is about."""
        return self.name.startswith(TREE)


def ours(name: str, variant: str, expansion: int = 1024, **settings: object) -> Entrant:
    """One of Kilobasis' own."""
    return Entrant(Contender(name, "kilobasis_run.py", variant, OURS), expansion, settings)


ENTRANTS = (
    ours(TREE, "tree-63-16-16"),
    ours("tree-routed", "tree-63-16-32"),
    ours("tree-slim", "tree-127-8-8"),
    ours("tree-balanced", "tree-63-16-16-balanced"),
    ours("dense-128", "dense", 128),
    ours("dense-1024", "dense", **MANY),
    ours("random-routes", "tree-63-16-16-random"),
    ours("no-residual", "tree-63-16-16-input"),
    ours("switch", "tree-1023-1-1"),
    Entrant(Contender("product-keys", "product_keys_run.py", "", OURS)),
)


@dataclass(frozen=True)
class Case:
    """How long, and on what. `overrides` are of the quickstart's manifest."""

    k: int = 32
    batch: int = 4096
    steps: int = 488
    threads: int = 2
    heldout: int = 65_536
    overrides: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Rows of the stream."""
        return self.steps * self.batch


QUICK = Case(batch=512, steps=12, heldout=2000, overrides=("harvest.tokens=20000", QUICK_CORPUS))


@dataclass(frozen=True)
class Ground:
    """A hook point: where everybody is trained alike."""

    case: Case
    source: Harvested
    hook: str
    bench: Bench
    folder: Path

    @property
    def width(self) -> int:
        """D."""
        return int(self.source.harvest.facts["layout"]["widths"][self.hook])

    def result(self, entrant: Entrant, rate: float, seed: int) -> Result:
        """Of one run."""
        case = self.case
        dead = {"dead_after": case.tokens // 4, "resample": max(case.batch, case.tokens // 16)}
        settings = dead | entrant.settings if entrant.contender.script == "kilobasis_run.py" else {}
        features = self.width * entrant.expansion
        shape = (self.width, features, case.k, case.batch, case.steps, case.threads, seed)
        plan = Plan(entrant.contender, *shape, rate=rate, settings=settings)
        asked = (self.source, self.hook, case.tokens, seed, case.heldout)
        label = f"{self.hook}, {entrant.name}, rate x {rate:g}, seed {seed}"
        return self.bench.result(
            plan, rows.stream_digest(*asked), lambda: rows.stream_files(*asked, self.folder), label
        )

    def standing(self, entrant: Entrant, rates: Sequence[float], seeds: Sequence[int], extra: int) -> Standing:
        """Of an entrant at its best rate."""
        together = self.bench.together
        searched = search(lambda rate: self.result(entrant, rate, seeds[0]), rates, extra, together=together)
        rate = best_rate(searched)
        return Standing(rate, searched, together(lambda seed: self.result(entrant, rate, seed), seeds))


Standings = dict[str, Standing]


def ratios(standings: Standings, name: str, by: str = TREE) -> list[float] | None:
    """An entrant's error over another's, seed by seed; None where either has none."""
    if name not in standings or by not in standings or standings[name].failure or standings[by].failure:
        return None
    return [own / theirs for own, theirs in zip(standings[name].fvus, standings[by].fvus, strict=True)]


def table(case: Case, hook: str, seeds: Sequence[int], standings: Standings) -> Table:
    """What a person reads."""
    shown = Table(
        title=f"{hook}: k {case.k}, B {case.batch}, {case.tokens:,} tokens: median (range) of {len(seeds)} seeds",
        caption="rate: times the default, best of a search (*: no worse one was tried on one side); ratio: to the tree",
    )
    for heading in ("dictionary", "rate", "FVU", "dead", "ratio", "s"):
        shown.add_column(heading, justify="left" if heading == "dictionary" else "right", no_wrap=True)
    for name, standing in standings.items():
        if standing.failure is not None:
            shown.add_row(name, f"{standing.rate:g}", f"failed: {standing.failure}"[:60], "", "", "")
            continue
        to_tree = ratios(standings, name)
        shown.add_row(
            name,
            f"{standing.rate:g}" + ("" if standing.inside else "*"),
            spread(standing.fvus, 4),
            spread([each.dead for each in standing.results], 3),
            spread(to_tree, 3) if to_tree else "",
            f"{statistics.median(each.seconds for each in standing.results):.0f}",
        )
    return shown


def facts(case: Case, hook: str, seeds: Sequence[int], standings: Standings) -> list[Fact]:
    """What a program reads."""
    found = []
    for name, standing in standings.items():
        config = dataclasses.asdict(case) | {"dictionary": name, "hook_point": hook, "seeds": list(seeds)}
        config |= {
            "rate": standing.rate,
            "searched": {f"{rate:g}": each.fvu for rate, each in standing.searched.items()},
        }
        prefix = f"trees/{hook}/{name}"
        if standing.failure is not None:
            found.append(fact(f"{prefix}/failed", [1.0], "count", config | {"reason": standing.failure}))
            continue
        found.append(fact(f"{prefix}/fvu", standing.fvus, "fraction", config))
        found.append(fact(f"{prefix}/dead", [each.dead for each in standing.results], "fraction", config))
        if to_tree := ratios(standings, name):
            found.append(fact(f"{prefix}/ratio", to_tree, "FVU / the tree's", config))
    return found


def judged(hook: str, standings: Standings) -> list[Mark]:
    """The marks of a hook point, as far as those took part that they compare."""
    made = []
    trees = [entrant.name for entrant in ENTRANTS if entrant.is_tree and entrant.name in standings]
    for by, bound in (("dense-128", BELOW), ("dense-1024", WITHIN)):
        if by in standings:
            found = [statistics.median(each) for name in trees if (each := ratios(standings, name, by)) is not None]
            made.append(Mark(f"{hook}: best tree's FVU, by {by}", min(found, default=None), "at most", bound))
    return made


def compare(options: argparse.Namespace, folder: Path, console: Console) -> int:
    """Train what is missing, and report."""
    case = QUICK if options.quick else Case()
    root = (f"root={folder / 'quickstart'}",) if options.quick else ()
    bench = Bench.of(options, folder / "trees.jsonl", console)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    source = rows.harvested([*case.overrides, *root])
    found, made, failed = list[Fact](), list[Mark](), False
    for hook in options.hook or HOOKS:
        ground = Ground(case, source, hook, bench, folder / "data")
        extra = 0 if options.quick else EXTRA
        taking_part = [
            each for each in ENTRANTS if each.name == TREE or options.only is None or each.name in options.only
        ]
        all_of_them = bench.together(
            functools.partial(ground.standing, rates=options.rates, seeds=options.seeds, extra=extra), taking_part
        )
        standings = {each.name: standing for each, standing in zip(taking_part, all_of_them, strict=True)}
        console.print(table(case, hook, options.seeds, standings))
        failed = failed or any(
            standings[each.name].failure for each in ENTRANTS if each.is_tree and each.name in standings
        )
        found += facts(case, hook, options.seeds, standings)
        made += judged(hook, standings)
        # A long run that is broken off leaves the hook points that it finished.
        marks.write(options.json, found)
    missed = marks.show([] if options.quick else made, console)
    return 1 if missed or failed else 0


def main() -> int:
    """Run the comparison; for the exit code see the module."""
    parser = argparse.ArgumentParser(
        description="Held-out error of trees, of dense dictionaries, and of other searches."
    )
    names = [entrant.name for entrant in ENTRANTS]
    parser.add_argument("--quick", action="store_true", help="a tiny case, kept in a --folder alone; without marks")
    parser.add_argument("--hook", action="append", choices=HOOKS, help="may be repeated")
    parser.add_argument("--only", action="append", choices=names, help=f"besides {TREE}; may be repeated")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="times the default; the search's start")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="rates are searched on the first")
    trainings.options(parser)
    options = parser.parse_args()
    console = Console(width=140)
    with trainings.kept(options) as folder:
        return compare(options, folder, console)


if __name__ == "__main__":
    sys.exit(main())
