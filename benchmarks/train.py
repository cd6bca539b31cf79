"""Trainer speed and memory beside the peers': whole optimizer steps, on the same batches.

    python benchmarks/train.py [--quick] [--case NAME ...] [--only NAME ...] [--json FILE]

Every contender runs in its own process, in the environment of its library (`.venv-peers` for the peers'),
and runs its library's own step: forward, loss, backward, clipping, optimizer, projection of the decoder,
bookkeeping of dead features, with that library's defaults, its own optimizer and, where it has a choice, Adam.
`encoder-gemm` is no library: it is the encoder's matrix product alone (see `peers/encoder_gemm.py`), without which no
exact step is possible. How the contenders take turns: see `race.py`. Ratios to Kilobasis are taken within each round.

Cases are named by width and expansion: d768x64 is D = 768 and F = 64 D. At 256 times the width peers may fail. All
contenders together get 12 GB, and one at whose turn they hold more is stopped; in the cases d768x64 and 256x only one
process is alive at a time, so each has the 12 GB to itself. A contender that fails is a row with the reason.

Memory is the largest resident set of a contender's process so far (Linux: VmHWM): the interpreter, torch, the library
and all that it imports, the batches (the same for all), weights, gradients, optimizer, and what a step holds at once.
Nothing is taken off, so a share of memory flatters nobody: what all have in common counts on both sides.

Exit code 1 where a mark is missed, where Kilobasis fails, or where a contender's held-out error does not fall (at 256
times the width, with a few steps, only Kilobasis' has to).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import marks
from contenders import OURS, REFERENCE, Contender, missing
from marks import Fact, Mark, fact, spread
from race import Case, Outcome, race, settings
from rich.console import Console
from rich.table import Table

FLOOR = "encoder-gemm"
CONTENDERS = (
    Contender(REFERENCE, "kilobasis_step.py", "row_adam", OURS),
    Contender(FLOOR, "encoder_gemm.py", "", OURS),
    Contender("saelens", "saelens_step.py", "dense"),
    Contender("saelens-sparse", "saelens_step.py", "sparse"),
    Contender("sparsify", "sparsify_step.py", "signum"),
    Contender("sparsify-adam", "sparsify_step.py", "adam"),
    Contender("dictionary_learning", "dictionary_learning_step.py", "adam"),
)

CASES = (
    Case(384, 16, k=32, batch=4096, threads=2, warmup=3, rounds=7, steps=6),
    Case(384, 64, k=32, batch=4096, threads=2, warmup=2, rounds=7, steps=3),
    Case(768, 16, k=32, batch=4096, threads=2, warmup=2, rounds=7, steps=3),
    Case(768, 64, k=32, batch=4096, threads=2, warmup=1, rounds=5, steps=2, alive="one"),
    Case(384, 256, k=32, batch=4096, threads=2, warmup=1, rounds=3, steps=6, alive="one"),
    Case(768, 256, k=32, batch=4096, threads=2, warmup=1, rounds=3, steps=1, alive="one"),
)
QUICK = (
    Case(64, 16, k=32, batch=1024, threads=2, warmup=2, rounds=3, steps=4),
    Case(64, 64, k=32, batch=1024, threads=2, warmup=2, rounds=2, steps=2, alive="one"),
)
# At this expansion and beyond peers may fail.
LARGE = 256

# How many times faster than the best peer, by expansion; the share of the leanest peer's memory, by expansion; the
# time of a step by that of the encoder's product.
SPEED = {16: 1.6, 64: 2.0}
SHARE = {64: 0.5}
STEP = 1.5

Outcomes = Mapping[str, Outcome]


def finished(outcomes: Outcomes) -> dict[str, Outcome]:
    """Those that ran all their rounds."""
    return {name: outcome for name, outcome in outcomes.items() if outcome.failure is None and outcome.seconds}


def rivals(outcomes: Outcomes) -> dict[str, Outcome]:
    """The peers among those."""
    return {name: outcome for name, outcome in finished(outcomes).items() if name not in (REFERENCE, FLOOR)}


def times(outcomes: Outcomes, name: str, measure: str = "seconds") -> list[float]:
    """Another's step over Kilobasis', round by round; above 1, Kilobasis is faster."""
    ours, theirs = getattr(outcomes[REFERENCE], measure), getattr(outcomes[name], measure)
    return [their / our for our, their in zip(ours, theirs, strict=True)]


def middle(values: Sequence[float]) -> float:
    """The median, through the one place that defines it."""
    return float(fact("", values, "", {})["value"])


def judged(case: Case, outcomes: Outcomes) -> list[Mark]:
    """The marks of a case. What could not be measured misses its mark, unless no peer was to be run."""
    alive, peers = finished(outcomes), rivals(outcomes)
    ours = alive.get(REFERENCE)
    made = []
    wanted = [name for name in outcomes if name not in (REFERENCE, FLOOR)]
    if wanted and case.expansion in SPEED:
        best = min((middle(times(outcomes, name)) for name in peers), default=None) if ours else None
        made.append(Mark(f"{case.name}: speed, by the best peer's", best, "at least", SPEED[case.expansion]))
    if wanted and case.expansion in SHARE:
        share = ours.peak_rss / leanest(outcomes) if ours and peers else None
        made.append(Mark(f"{case.name}: memory, by the leanest peer's", share, "at most", SHARE[case.expansion]))
    if FLOOR in outcomes:
        step = middle(of_floor(outcomes, REFERENCE)) if ours and FLOOR in alive else None
        made.append(Mark(f"{case.name}: step, by the encoder's product", step, "at most", STEP))
    return made


def leanest(outcomes: Outcomes) -> int:
    """Peak memory of the peer that takes least, in bytes."""
    return min(outcome.peak_rss for outcome in rivals(outcomes).values())


def learned(case: Case, outcomes: Outcomes) -> bool:
    """Whether errors fall that have to."""
    if REFERENCE not in finished(outcomes):
        return False
    have_to = finished(outcomes) if case.expansion < LARGE else {REFERENCE: outcomes[REFERENCE]}
    return all(outcome.learns for name, outcome in have_to.items() if name != FLOOR)


def table(case: Case, outcomes: Outcomes) -> Table:
    """What a person reads."""
    shown = Table(
        title=f"{case.name}: D {case.width}, F {case.features}, k {case.k}, B {case.batch}, float32, "
        f"{case.threads} threads: median of {case.rounds} rounds of {case.steps} steps",
        caption="times: its step over Kilobasis', by the clock, then by CPU time; step: over the encoder's product; "
        "RSS: peak, in MiB; ours: Kilobasis' RSS over this one",
    )
    for heading in ("trainer", "tokens/s", "times (range)", "CPU", "step (range)", "RSS", "ours", "FVU"):
        shown.add_column(heading, justify="left" if heading == "trainer" else "right", no_wrap=True)
    for name in outcomes:
        shown.add_row(name, *row(case, outcomes, name))
    failed = {name: outcome.failure for name, outcome in outcomes.items() if outcome.failure is not None}
    if failed:
        shown.caption = "\n".join([f"{shown.caption}", *(f"{name} failed: {why}" for name, why in failed.items())])
    return shown


def row(case: Case, outcomes: Outcomes, name: str) -> list[str]:
    """A contender's cells behind its name."""
    outcome, alive = outcomes[name], finished(outcomes)
    if name not in alive:
        return ["failed, see below", *[""] * 6]
    against = name != REFERENCE and REFERENCE in alive
    step = spread(of_floor(outcomes, name)) if name != FLOOR and FLOOR in alive else ""
    cells = [
        f"{case.batch / middle(outcome.seconds):,.0f}",
        spread(times(outcomes, name)) if against else "",
        f"{middle(times(outcomes, name, 'cpu_seconds')):.2f}" if against else "",
        step,
        f"{outcome.peak_rss / 2**20:,.0f}",
    ]
    if name == FLOOR:
        return [*cells, "", ""]
    share = f"{outcomes[REFERENCE].peak_rss / outcome.peak_rss:.2f}" if against else ""
    return [*cells, share, f"{outcome.ended:.3f}" + ("" if outcome.learns else " does not fall")]


def of_floor(outcomes: Outcomes, name: str) -> list[float]:
    """A contender's step over the encoder's product, round by round."""
    pairs = zip(outcomes[name].seconds, outcomes[FLOOR].seconds, strict=True)
    return [step / product for step, product in pairs]


def facts(case: Case, outcomes: Outcomes) -> list[Fact]:
    """What a program reads."""
    found = []
    alive = finished(outcomes)
    for name, outcome in outcomes.items():
        config = settings(case) | {"contender": name}
        prefix = f"train/{case.name}/{name}"
        if name not in alive:
            found.append(fact(f"{prefix}/failed", [1.0], "count", config | {"reason": outcome.failure}))
            continue
        found.append(
            fact(f"{prefix}/tokens_per_s", [case.batch / each for each in outcome.seconds], "tokens/s", config)
        )
        per_cpu = [case.batch / each for each in outcome.cpu_seconds]
        found.append(fact(f"{prefix}/tokens_per_cpu_s", per_cpu, "tokens/CPU-s", config))
        found.append(fact(f"{prefix}/peak_rss", [outcome.peak_rss], "bytes", config))
        if name != FLOOR:
            found.append(fact(f"{prefix}/fvu", [outcome.ended], "fraction", config))
            if FLOOR in alive:
                found.append(fact(f"{prefix}/step_by_gemm", of_floor(outcomes, name), "step / encoder GEMM", config))
        if name != REFERENCE and REFERENCE in alive:
            found.append(fact(f"{prefix}/times", times(outcomes, name), "its step / kilobasis'", config))
            ours = outcomes[REFERENCE].peak_rss / outcome.peak_rss
            found.append(fact(f"{prefix}/memory_share", [ours], "kilobasis / contender", config))
    return found


def main() -> int:
    """Run every case; for the exit code see the module."""
    parser = argparse.ArgumentParser(description="Trainer speed and memory of Kilobasis and of its peers, interleaved.")
    names = [contender.name for contender in CONTENDERS]
    parser.add_argument("--quick", action="store_true", help="two small cases and few rounds; without marks")
    parser.add_argument("--case", action="append", choices=[case.name for case in CASES], help="may be repeated")
    parser.add_argument("--only", action="append", choices=names, help=f"besides {REFERENCE}; may be repeated")
    parser.add_argument("--json", type=Path, help="write a list of {name, value, unit, config}")
    options = parser.parse_args()
    contenders = [each for each in CONTENDERS if each.name in {REFERENCE, *(options.only or names)}]
    if wrong := missing(contenders):
        parser.error(wrong)
    if options.quick and options.case:
        parser.error("--quick has cases of its own; leave out --case")
    console, found, made, falls = Console(width=140), list[Fact](), list[Mark](), True
    for case in QUICK if options.quick else CASES:
        if options.case and case.name not in options.case:
            continue
        outcomes = race(case, contenders, lambda line: console.print(line, style="dim"))
        console.print(table(case, outcomes))
        found += facts(case, outcomes)
        made += judged(case, outcomes)
        falls = falls and learned(case, outcomes)
        # A long run that is broken off leaves the cases that it finished.
        marks.write(options.json, found)
    missed = marks.show([] if options.quick else made, console)
    return 0 if falls and not missed else 1


if __name__ == "__main__":
    sys.exit(main())
