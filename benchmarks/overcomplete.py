"""What a thousand times more features cost: steps of trees, of dense dictionaries, and of the best peer.

    python benchmarks/overcomplete.py [--quick] [--case d384 ...] [--batch B] [--rounds N] [--only NAME ...]

Trees have 16 D parents whatever their size: at 64 D with 3 children each, at 1024 D with 63. Half of the k that fire
are parents, and the children of those are searched. `slim` ones have 8 D parents with twice as many children, and a
quarter of k are parents. Float32, but for those of `bfloat16`, whose rows and first moments are. The reference is our
fastest dense one. One process is alive at a time (see `race.py`); a round starts each afresh, warms it up, and times
it. The ratio is of a contender's step to the dense step at 16 D, in the same round.

Exit code 1 where a mark is missed, where one of ours fails, or where its held-out error does not fall.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import marks
from contenders import OURS, REFERENCE, Contender, missing
from marks import Fact, Mark, fact, spread
from race import Case, Outcome, race, settings
from rich.console import Console
from rich.table import Table

BASE = 16
STEP = "kilobasis_step.py"


def tree(expansion: int, ways: str = "", parents: int = BASE) -> Contender:
    """A tree, of so many parents times D."""
    name = f"tree-{expansion}{'-slim' if parents < BASE else ''}{ways}"
    return Contender(name, STEP, f"tree-{expansion // parents - 1}{ways}", OURS)


# Who, and how many times more features than dimensions.
CONTENDERS: tuple[tuple[Contender, int], ...] = (
    (Contender(REFERENCE, STEP, "bfloat16", OURS), BASE),
    (Contender("dense-16", STEP, "row_adam", OURS), BASE),
    (tree(64), 64),
    (tree(256), 256),
    (tree(1024), 1024),
    (tree(1024, "", BASE // 2), 1024),
    (tree(1024, "-bfloat16"), 1024),
    (tree(1024, "-bfloat16", BASE // 2), 1024),
    (tree(4096, "-bfloat16"), 4096),
    (Contender("dense-64", STEP, "row_adam", OURS), 64),
    (Contender("dense-256", STEP, "row_adam", OURS), 256),
    (Contender("sparsify-16", "sparsify_step.py", "signum"), 16),
    (Contender("sparsify-64", "sparsify_step.py", "signum"), 64),
    (Contender("sparsify-256", "sparsify_step.py", "signum"), 256),
)
CASES = (
    Case(384, BASE, k=32, batch=4096, threads=2, warmup=2, rounds=5, steps=4, alive="one"),
    Case(768, BASE, k=32, batch=4096, threads=2, warmup=2, rounds=3, steps=2, alive="one"),
)
QUICK = Case(64, BASE, k=16, batch=512, threads=2, warmup=1, rounds=2, steps=2, alive="one")
QUICK_SIZES = 256

# The time of a step of a tree at 1024 D by that of a dense one at 16 D; a tree's tokens/s by the best peer's at 64 D.
COST, SPEED = 1.5, 3.0


def name_of(case: Case) -> str:
    """How a case is chosen."""
    return f"d{case.width}"


def ratios(outcomes: dict[str, Outcome], name: str, by: str = REFERENCE) -> list[float]:
    """A contender's step over another's, round by round."""
    pairs = zip(outcomes[name].seconds, outcomes[by].seconds, strict=True)
    return [mine / theirs for mine, theirs in pairs]


def ran(outcomes: dict[str, Outcome], name: str) -> bool:
    """Whether it ran all its rounds."""
    return name in outcomes and outcomes[name].failure is None and bool(outcomes[name].seconds)


def median(values: list[float]) -> float:
    """Through the one place that defines it."""
    return float(fact("", values, "", {})["value"])


def judged(case: Case, outcomes: dict[str, Outcome]) -> list[Mark]:
    """The marks of a case; what could not be measured misses its mark."""
    where, made = name_of(case), []
    trees = [name for name in outcomes if name.startswith("tree-1024") and ran(outcomes, name)]
    cost = min((median(ratios(outcomes, name)) for name in trees), default=None)
    made.append(Mark(f"{where}: tree at 1024 D, by dense at 16 D", cost, "at most", COST))
    if "sparsify-64" in outcomes:
        both = ran(outcomes, "sparsify-64") and ran(outcomes, "tree-64")
        speed = median(ratios(outcomes, "sparsify-64", "tree-64")) if both else None
        made.append(Mark(f"{where}: tree at 64 D, by the best peer's speed", speed, "at least", SPEED))
    return made


def table(case: Case, outcomes: dict[str, Outcome], sizes: dict[str, int]) -> Table:
    """What a person reads."""
    shown = Table(
        title=f"D {case.width}, k {case.k}, B {case.batch}, {case.threads} threads: median of {case.rounds} rounds of "
        f"{case.steps} steps",
        caption="times: its step over the dense one at 16 D, by the clock, then by CPU time; optimizer: "
        "what it reads and writes in a step, RSS: peak, both in MiB",
    )
    for heading in ("trainer", "F / D", "F", "tokens/s", "times (range)", "CPU", "optimizer", "RSS", "FVU"):
        shown.add_column(heading, justify="left" if heading == "trainer" else "right", no_wrap=True)
    for name, outcome in outcomes.items():
        size = [f"{sizes[name]}", f"{sizes[name] * case.width:,}"]
        if not ran(outcomes, name):
            shown.add_row(name, *size, f"failed: {outcome.failure}")
            continue
        cpu = [mine / base for mine, base in zip(outcome.cpu_seconds, outcomes[REFERENCE].cpu_seconds, strict=True)]
        shown.add_row(
            name, *size, f"{case.batch / median(outcome.seconds):,.0f}", spread(ratios(outcomes, name)),
            f"{median(cpu):.2f}", f"{outcome.traffic / 2**20:,.0f}", f"{outcome.peak_rss / 2**20:,.0f}",
            f"{outcome.ended:.3f}" + ("" if outcome.learns else " does not fall"),
        )  # fmt: skip
    return shown


def facts(case: Case, outcomes: dict[str, Outcome], sizes: dict[str, int]) -> list[Fact]:
    """What a program reads."""
    found = []
    for name, outcome in outcomes.items():
        config = settings(case) | {"contender": name, "expansion": sizes[name], "features": sizes[name] * case.width}
        prefix = f"overcomplete/{name_of(case)}/{name}"
        if not ran(outcomes, name):
            found.append(fact(f"{prefix}/failed", [1.0], "count", config | {"reason": outcome.failure}))
            continue
        found.append(fact(f"{prefix}/seconds", outcome.seconds, "s/step", config))
        found.append(fact(f"{prefix}/times", ratios(outcomes, name), "its step / dense at 16 D", config))
        found.append(fact(f"{prefix}/peak_rss", [outcome.peak_rss], "bytes", config))
        found.append(fact(f"{prefix}/optimizer_traffic", [outcome.traffic], "bytes/step", config))
    return found


def main() -> int:
    """Run every case; for the exit code see the module."""
    parser = argparse.ArgumentParser(description="The cost of a step by the number of features, interleaved.")
    names = [contender.name for contender, _ in CONTENDERS]
    parser.add_argument("--quick", action="store_true", help="one small case and few rounds; without marks")
    parser.add_argument("--case", action="append", choices=[name_of(case) for case in CASES], help="may be repeated")
    parser.add_argument("--batch", type=int, help="tokens of a step")
    parser.add_argument("--rounds", type=int, help="how often each is timed")
    parser.add_argument("--only", action="append", choices=names, help=f"besides {REFERENCE}; may be repeated")
    parser.add_argument("--json", type=Path, help="write a list of {name, value, unit, config}")
    options = parser.parse_args()
    wanted = {REFERENCE, *(options.only or names)}
    chosen = [(each, size) for each, size in CONTENDERS if each.name in wanted]
    if options.quick:
        chosen = [(each, size) for each, size in chosen if size <= QUICK_SIZES]
    if wrong := missing([each for each, _ in chosen]):
        parser.error(wrong)
    sizes = {each.name: size for each, size in chosen}
    console, found, made, learns = Console(width=140), list[Fact](), list[Mark](), True
    for case in (QUICK,) if options.quick else CASES:
        if options.case and name_of(case) not in options.case:
            continue
        case = replace(case, batch=options.batch or case.batch, rounds=options.rounds or case.rounds)
        everybody = [each for each, _ in chosen]
        outcomes = race(case, everybody, lambda line: console.print(line, style="dim"), expansions=sizes)
        console.print(table(case, outcomes, sizes))
        found += facts(case, outcomes, sizes)
        made += judged(case, outcomes)
        ours = [name for name in outcomes if not name.startswith("sparsify")]
        learns = learns and all(ran(outcomes, name) and outcomes[name].learns for name in ours)
        # A long run that is broken off leaves the cases that it finished.
        marks.write(options.json, found)
    missed = marks.show([] if options.quick else made, console)
    return 0 if learns and not missed else 1


if __name__ == "__main__":
    sys.exit(main())
