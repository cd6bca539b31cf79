"""Quality beside the peers': held-out error of whole training runs on the same tokens in the same order.

    python benchmarks/quality.py [--quick] [--only NAME ...] [--rates R ...] [--seeds N ...]
                                 [--device cuda --jobs N] [--json FILE]

The activations are those of the quickstart (its harvest is made first, where it is not committed): the training
stream as the train stage reads it, and rows of documents that nobody is trained on. Every contender is trained by its
library's own entry point with that library's defaults (see `peers/*_run.py`): learning rate and schedule, warm-up,
clipping, auxiliary loss, initialization and normalization. Where a library has more than one way that it recommends,
each is a contender. Same k, F, batch and tokens for all. One thing is changed in the peers' favour: a warm-up of 1000
steps is cut to a tenth of the run, because the run is no longer than that.

Learning rates are searched for everybody alike, Kilobasis included: on the first seed each contender is trained at
`--rates` times its own default, and on beyond an end of the grid as long as that end is the best. The best rate by
held-out FVU is what all seeds are trained with.

FVU: sum of squared errors over sum of squared deviations from the mean, over all held-out rows, unscaled. Dead: share
of features that fire neither on a held-out row nor on the last 500,000 rows of training.

The mark: the median over seeds of Kilobasis' FVU over the best peer's is at most 1.01; exit code 1 where it is missed,
or where a contender fails. Every run is kept as soon as it ends (see `trainings.py`): start again to go on.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import marks
import rows
import trainings
from contenders import OURS, REFERENCE, Contender, missing
from marks import Fact, Mark, fact, spread
from rich.console import Console
from rich.table import Table
from rows import Harvested
from trainings import Bench, Plan, Result

CONTENDERS = (
    Contender(REFERENCE, "kilobasis_run.py", "row_adam", OURS),
    Contender("saelens", "saelens_run.py", "raw"),
    Contender("saelens-normalized", "saelens_run.py", "normalized"),
    Contender("sparsify", "sparsify_run.py", "signum"),
    Contender("sparsify-adam", "sparsify_run.py", "adam"),
    Contender("dictionary_learning", "dictionary_learning_run.py", "raw"),
    Contender("dictionary_learning-normalized", "dictionary_learning_run.py", "normalized"),
)
MARK = 1.01
HOOK_POINT = "gpt_neox.layers.2"
RATES, SEEDS = (0.5, 1.0, 2.0), (0, 1, 2)
# A search goes at most so many times beyond its grid, each time by this factor.
EXTRA, FACTOR = 6, 2.0


@dataclass(frozen=True)
class Case:
    """What is trained: the quickstart's dictionary, for as many tokens. `overrides` are of its manifest."""

    features: int = 4096
    k: int = 32
    batch: int = 4096
    steps: int = 976
    threads: int = 2
    heldout: int = 100_000
    overrides: tuple[str, ...] = ()


QUICK = Case(features=256, k=16, batch=512, steps=40, heldout=2000, overrides=("harvest.tokens=20000",))
# Text enough for those tokens.
QUICK_CORPUS = "corpus.max_documents=6"


class Contest:
    """The runs of a case: which are wanted, and what came of them.

    Args:
        case: What is trained.
        source: The harvest.
        bench: Runs, or remembers.
        folder: For data.
    """

    def __init__(self, case: Case, source: Harvested, bench: Bench, folder: Path) -> None:
        self.case, self._source, self._bench, self._folder = case, source, bench, folder
        folder.mkdir(parents=True, exist_ok=True)
        self._width = source.harvest.facts["layout"]["widths"][HOOK_POINT]

    def result(self, contender: Contender, rate: float, seed: int) -> Result:
        """Of one run. Its seed decides the order of the tokens as well, for all contenders the same."""
        case = self.case
        plan = Plan(
            contender, self._width, case.features, case.k, case.batch, case.steps, case.threads, seed, rate=rate
        )
        asked = (self._source, HOOK_POINT, case.steps * case.batch, seed, case.heldout)
        label = f"{contender.name}, rate x {rate:g}, seed {seed}"
        digest = rows.stream_digest(*asked)
        return self._bench.result(plan, digest, lambda: rows.stream_files(*asked, self._folder), label)

    def standing(self, contender: Contender, rates: Sequence[float], seeds: Sequence[int], extra: int) -> Standing:
        """Of a contender at its best rate; see `search`."""
        together = self._bench.together
        searched = search(lambda rate: self.result(contender, rate, seeds[0]), rates, extra, together=together)
        rate = best_rate(searched)
        return Standing(rate, searched, together(lambda seed: self.result(contender, rate, seed), seeds))


Best = Callable[[Mapping[float, Result]], float]
Together = Callable[[Callable[[float], Result], Sequence[float]], Iterable[Result]]


def search(
    result: Callable[[float], Result],
    rates: Sequence[float],
    extra: int,
    best_of: Best | None = None,
    together: Together = map,
) -> dict[float, Result]:
    """By rate: those of the grid, and those beyond as long as an end of it is the best.

    Args:
        result: Of a rate.
        rates: The grid.
        extra: Most rates beyond.
        best_of: Which is the best; the one with the lowest error if left out.
        together: Makes those of the grid.
    """
    best_of = best_of or best_rate
    found = dict(zip(rates, together(result, rates), strict=True))
    for _ in range(extra):
        best = best_of(found)
        if best not in (min(found), max(found)):
            break
        beyond = best * FACTOR if best == max(found) else best / FACTOR
        found[beyond] = result(beyond)
    return found


def best_rate(found: Mapping[float, Result]) -> float:
    """The one with the lowest error; of equal ones the lower.

    >>> best_rate({1.0: Result(0.2), 2.0: Result(0.1), 4.0: Result(0.1)})
    2.0
    """
    return min(sorted(found), key=lambda rate: found[rate].fvu)


@dataclass(frozen=True)
class Standing:
    """A contender's search and its runs at the best rate, one a seed."""

    rate: float
    searched: Mapping[float, Result]
    results: Sequence[Result]

    @property
    def failure(self) -> str | None:
        """Why it has no number, if it has none."""
        return next((each.failure for each in self.results if each.failure is not None), None)

    @property
    def inside(self) -> bool:
        """Whether rates on both sides of the best one are worse."""
        return min(self.searched) < self.rate < max(self.searched)

    @property
    def fvus(self) -> list[float]:
        """By seed."""
        return [each.fvu for each in self.results]


Standings = Mapping[str, Standing]


def best_peer(standings: Standings) -> str | None:
    """The peer with the lowest median error."""
    peers = [name for name, each in standings.items() if name != REFERENCE and each.failure is None]
    return min(peers, key=lambda name: statistics.median(standings[name].fvus), default=None)


def ratios(standings: Standings, name: str) -> list[float]:
    """A contender's error over the best peer's, seed by seed; below 1 it is better."""
    best = best_peer(standings)
    assert best is not None
    return [own / theirs for own, theirs in zip(standings[name].fvus, standings[best].fvus, strict=True)]


def table(case: Case, seeds: Sequence[int], standings: Standings) -> Table:
    """What a person reads."""
    best = best_peer(standings)
    shown = Table(
        title=f"F {case.features}, k {case.k}, B {case.batch}, {case.steps * case.batch:,} tokens of {HOOK_POINT}: "
        f"median (range) of {len(seeds)} seeds",
        caption="rate: times the library's default, best of a search (*: no worse rate was tried on one side)"
        + (f"; ratio: FVU over that of {best}" if best else ""),
    )
    for heading in ("trainer", "rate", "FVU", "dead", "ratio"):
        shown.add_column(heading, justify="left" if heading == "trainer" else "right", no_wrap=True)
    for name, standing in standings.items():
        if standing.failure is not None:
            shown.add_row(name, f"{standing.rate:g}", f"failed: {standing.failure}"[:60], "", "")
            continue
        shown.add_row(
            name,
            f"{standing.rate:g}" + ("" if standing.inside else "*"),
            spread(standing.fvus, 4),
            spread([each.dead for each in standing.results], 3),
            spread(ratios(standings, name), 3) if best else "",
        )
    return shown


def facts(case: Case, seeds: Sequence[int], standings: Standings) -> list[Fact]:
    """What a program reads."""
    found = []
    for name, standing in standings.items():
        searched = {f"{rate:g}": each.fvu for rate, each in sorted(standing.searched.items()) if not each.failure}
        config = dataclasses.asdict(case) | {"contender": name, "hook_point": HOOK_POINT, "seeds": list(seeds)}
        config |= {"rate": standing.rate, "searched": searched}
        if standing.failure is not None:
            found.append(fact(f"quality/{name}/failed", [1.0], "count", config | {"reason": standing.failure}))
            continue
        found.append(fact(f"quality/{name}/fvu", standing.fvus, "fraction", config))
        found.append(fact(f"quality/{name}/dead", [each.dead for each in standing.results], "fraction", config))
        if best_peer(standings):
            found.append(fact(f"quality/{name}/ratio", ratios(standings, name), "FVU / the best peer's", config))
    return found


def judged(standings: Standings) -> list[Mark]:
    """The mark, where there was a peer to compare with."""
    if set(standings) == {REFERENCE}:
        return []
    measured = best_peer(standings) is not None and standings[REFERENCE].failure is None
    value = statistics.median(ratios(standings, REFERENCE)) if measured else None
    return [Mark("held-out FVU, by the best peer's", value, "at most", MARK)]


def contest(options: argparse.Namespace, contenders: Sequence[Contender], folder: Path, console: Console) -> int:
    """Train what is missing, and report."""
    case = QUICK if options.quick else Case()
    root = (f"root={folder / 'quickstart'}", QUICK_CORPUS) if options.quick else ()
    bench = Bench.of(options, folder / "quality.jsonl", console)
    arena = Contest(case, rows.harvested([*case.overrides, *root]), bench, folder / "data")
    extra = 0 if options.quick else EXTRA
    made = bench.together(lambda each: arena.standing(each, options.rates, options.seeds, extra), contenders)
    standings = {contender.name: standing for contender, standing in zip(contenders, made, strict=True)}
    console.print(table(case, options.seeds, standings))
    marks.write(options.json, facts(case, options.seeds, standings))
    missed = marks.show([] if options.quick else judged(standings), console)
    return 1 if missed or any(each.failure for each in standings.values()) else 0


def main() -> int:
    """Run the contest; for the exit code see the module."""
    parser = argparse.ArgumentParser(description="Held-out error of dictionaries of Kilobasis and of its peers.")
    names = [contender.name for contender in CONTENDERS]
    parser.add_argument("--quick", action="store_true", help="a tiny case, kept in a --folder alone; without a mark")
    parser.add_argument("--only", action="append", choices=names, help=f"besides {REFERENCE}; may be repeated")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="times each default; the search's start")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="rates are searched on the first")
    trainings.options(parser)
    options = parser.parse_args()
    contenders = [each for each in CONTENDERS if each.name in {REFERENCE, *(options.only or names)}]
    if wrong := missing(contenders):
        parser.error(wrong)
    console = Console(width=140)
    with trainings.kept(options) as folder:
        return contest(options, contenders, folder, console)


if __name__ == "__main__":
    sys.exit(main())
