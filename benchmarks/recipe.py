"""What each part of the training recipe is worth: one thing changed at a time around the default.

    python benchmarks/recipe.py [--quick] [--on NAME ...] [--factor NAME ...] [--seeds N ...]
                                [--device cuda --jobs N] [--json FILE]

On two kinds of data. `quickstart`: activations of the quickstart's model (see `quality.py`, same definitions of FVU and
dead). `truth`: synthetic activations whose true features are known, every batch of fresh tokens. There, besides, two
mean largest cosine similarities: `found`, of true features to the decoder rows that fire (how much of the truth was
found), and `true`, of those rows to the true features (how much of what was found is true).

The default is the manifest's, but for `dead_after`, which is a quarter of the run, or no feature could ever be dead in
it and `aux_k` would change nothing. Every row of the tables differs from the default in one thing. The last groups
train at other F, k and batches, of as many tokens, at several learning rates: where the default scales rightly, the
best factor is the same everywhere.

`ratio` is the FVU over the default's of the same seed (in the last groups: over the same size at rate x 1); below 1 it
is better. Differences smaller than the range over seeds say nothing. The tables go to `benchmarks/recipe.md` (not with
--quick, or where only a part is run). Every run is kept as soon as it ends (see `trainings.py`): start again to go on.
Exit code 1 where a run of the default failed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import marks
import rows
import trainings
from contenders import HERE, OURS, REFERENCE, Contender
from marks import Fact, fact, spread
from rich.console import Console
from rich.table import Table
from synthetic import GroundTruth
from trainings import Bench, Files, Plan, Result

OURS_RUN = Contender(REFERENCE, "kilobasis_run.py", "", OURS)
HOOK_POINT = "gpt_neox.layers.2"
PAGE = HERE / "recipe.md"
DATA = ("quickstart", "truth")
TRUTH = GroundTruth(width=128, directions=2048)


@dataclass(frozen=True)
class Variant:
    """The default with one thing changed; `size` is a field of the case with its value."""

    factor: str
    value: str
    settings: dict[str, Any] = field(default_factory=dict)
    rate: float = 1.0
    start: float = 1.0
    size: tuple[str, int] | None = None


DEFAULT = Variant("default", "")
RATES = (0.25, 0.5, 2.0, 4.0)
SIZES, SIZE_RATES = {"expansion": (8, 128), "k": (8,), "batch": (1024,)}, (0.5, 1.0, 2.0, 4.0)


def variants(dead_after: int) -> list[Variant]:
    """All of them, the default first."""

    def of(factor: str, *values: object, name: str | None = None) -> Iterator[Variant]:
        for value in values:
            yield Variant(factor, str(value), {name or factor: value})

    return [
        DEFAULT,
        *(Variant("learning rate", f"x {rate:g}", rate=rate) for rate in RATES),
        *of("warmup", 0.0, 0.1),
        *of("decay", 0.0, 0.5, 0.98),
        Variant("aux_k", "off", {"aux_k": 0}),
        Variant("aux_k", "32", {"aux_k": 32}),
        Variant("dead_after", "half as many", {"dead_after": dead_after // 2}),
        *of("beta2", 0.9, 0.99, 0.9999),
        *of("clip", 0.0, 0.1),
        *(Variant("encoder at start", f"x {start:g}", start=start) for start in (0.5, 2.0)),
        *of("second_moment", "full"),
        *of("beta1", 0.0, 0.8, 0.95),
        Variant("beta1, rate", "0, x 2", {"beta1": 0.0}, rate=2.0),
        *of("optimizer", "adam"),
        *(
            Variant(f"rate at {name}", f"{size}, x {rate:g}", rate=rate, size=(name, size))
            for name, sizes in SIZES.items()
            for size in sizes
            for rate in SIZE_RATES
        ),
    ]


@dataclass(frozen=True)
class Case:
    """How long, and on what. `truth` says of what synthetic activations are made."""

    expansion: int = 32
    k: int = 32
    batch: int = 4096
    steps: int = 488
    threads: int = 2
    heldout: int = 65_536
    truth: GroundTruth = TRUTH
    overrides: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Rows of the stream."""
        return self.steps * self.batch

    def of(self, variant: Variant) -> Case:
        """The case at a variant's size, with as many whole batches as the stream has."""
        if variant.size is None:
            return self
        sized = replace(self, **dict([variant.size]))
        return replace(sized, steps=self.tokens // sized.batch)


QUICK = Case(
    expansion=2,
    k=16,
    batch=512,
    steps=30,
    heldout=2000,
    truth=GroundTruth(width=64, directions=128),
    overrides=("harvest.tokens=20000", "corpus.max_documents=6"),
)


@dataclass(frozen=True)
class Data:
    """One kind of activations: its width, and the files of a seed, with what says which they are."""

    name: str
    width: int
    digest: Callable[[int], str]
    files: Callable[[int], Files]


def truth(case: Case, folder: Path) -> Data:
    """Synthetic activations."""
    made, tokens, heldout = case.truth, case.tokens, case.heldout
    return Data(
        "truth",
        made.width,
        lambda seed: rows.truth_digest(made, tokens, seed, heldout),
        lambda seed: rows.truth_files(made, tokens, seed, heldout, folder),
    )


def quickstart(case: Case, folder: Path, overrides: Sequence[str]) -> Data:
    """Activations of the quickstart's model."""
    source = rows.harvested([*case.overrides, *overrides])
    return Data(
        "quickstart",
        source.harvest.facts["layout"]["widths"][HOOK_POINT],
        lambda seed: rows.stream_digest(source, HOOK_POINT, case.tokens, seed, case.heldout),
        lambda seed: rows.stream_files(source, HOOK_POINT, case.tokens, seed, case.heldout, folder),
    )


@dataclass(frozen=True)
class Measured:
    """A variant's runs on one kind of data, one a seed, and those that it is compared with."""

    data: str
    variant: Variant
    results: Sequence[Result]
    against: Sequence[Result]

    @property
    def failure(self) -> str | None:
        """Why it has no number, if it has none."""
        return next((each.failure for each in [*self.results, *self.against] if each.failure is not None), None)

    def values(self, name: str) -> list[float]:
        """Of one field of the results, by seed; none where the data has no truth."""
        return [value for each in self.results if (value := getattr(each, name)) is not None]

    @property
    def ratios(self) -> list[float]:
        """FVU over the compared one's, by seed."""
        return [each.fvu / other.fvu for each, other in zip(self.results, self.against, strict=True)]


def measure(case: Case, data: Data, wanted: Sequence[Variant], seeds: Sequence[int], bench: Bench) -> list[Measured]:
    """Train what is missing. Seed by seed, so that an unfinished run has a whole table of fewer seeds."""

    def result(variant: Variant, seed: int) -> Result:
        settings = {"dead_after": case.tokens // 4} | variant.settings
        sized = case.of(variant)
        plan = Plan(
            OURS_RUN,
            data.width,
            data.width * sized.expansion,
            sized.k,
            sized.batch,
            sized.steps,
            case.threads,
            seed,
            variant.rate,
            variant.start,
            settings,
        )
        label = f"{data.name}, {variant.factor} {variant.value}, seed {seed}"
        return bench.result(plan, data.digest(seed), lambda: data.files(seed), label)

    asked = [(variant, seed) for seed in seeds for variant in wanted]
    found = {variant_name(variant): list[Result]() for variant in wanted}
    for (variant, _), made in zip(asked, bench.together(lambda each: result(*each), asked), strict=True):
        found[variant_name(variant)].append(made)
    return [
        Measured(data.name, variant, found[variant_name(variant)], found[compared(variant)])
        for variant in wanted
        if compared(variant) in found
    ]


def variant_name(variant: Variant) -> str:
    """Distinct for every variant."""
    return f"{variant.factor} {variant.value}".strip()


def compared(variant: Variant) -> str:
    """The name of the variant whose error the ratio is taken to."""
    return f"{variant.factor} {variant.size[1]}, x 1" if variant.size else variant_name(DEFAULT)


COLUMNS = ("changed", "to", "FVU", "ratio", "dead", "found", "true")


def cells(measured: Measured) -> list[str]:
    """A row of the table."""
    head = [measured.variant.factor, measured.variant.value]
    if measured.failure is not None:
        return [*head, f"failed: {measured.failure}", "", "", "", ""]
    return [
        *head,
        spread(fvu, 4) if len(fvu := measured.values("fvu")) > 1 else f"{fvu[0]:.4f}",
        f"{statistics.median(measured.ratios):.3f}",
        f"{statistics.median(measured.values('dead')):.3f}",
        *(
            f"{statistics.median(values):.3f}" if (values := measured.values(name)) else ""
            for name in ("found", "true")
        ),
    ]


def table(name: str, measured: Sequence[Measured]) -> Table:
    """What a person reads on a terminal."""
    shown = Table(title=name, caption="ratio: FVU over the default's of the same seed")
    for heading in COLUMNS:
        shown.add_column(heading, justify="left" if heading in COLUMNS[:2] else "right")
    for each in measured:
        shown.add_row(*cells(each))
    return shown


def page(case: Case, seeds: Sequence[int], measured: Sequence[Measured]) -> str:
    """The same in Markdown."""
    lines = [
        "# What each part of the recipe is worth",
        "",
        f"Made by `benchmarks/recipe.py`, whose docstring explains it. {case.tokens:,} tokens in batches of "
        f"{case.batch}, F = {case.expansion} d, k = {case.k}; "
        + ("one seed." if len(seeds) == 1 else f"{len(seeds)} seeds: median, and range for FVU."),
    ]
    for name in dict.fromkeys(each.data for each in measured):
        lines += ["", f"## {name}", "", f"| {' | '.join(COLUMNS)} |", f"|{'---|' * 2}{'---:|' * (len(COLUMNS) - 2)}"]
        lines += [f"| {' | '.join(cells(each))} |" for each in measured if each.data == name]
    return "\n".join(lines) + "\n"


def facts(case: Case, seeds: Sequence[int], measured: Sequence[Measured]) -> list[Fact]:
    """What a program reads."""
    found = []
    units = {"fvu": "fraction", "dead": "fraction", "found": "mean max cosine", "true": "mean max cosine"}
    for each in measured:
        prefix = f"recipe/{each.data}/{variant_name(each.variant)}"
        config = asdict(case) | {"seeds": list(seeds)} | asdict(each.variant)
        if each.failure is not None:
            found.append(fact(f"{prefix}/failed", [1.0], "count", config | {"reason": each.failure}))
            continue
        found.append(fact(f"{prefix}/ratio", each.ratios, "FVU / the default's", config))
        found += [
            fact(f"{prefix}/{name}", values, unit, config)
            for name, unit in units.items()
            if (values := each.values(name))
        ]
    return found


def ablate(options: argparse.Namespace, folder: Path, console: Console) -> int:
    """Train what is missing, and report."""
    case = QUICK if options.quick else Case()
    bench = Bench.of(options, folder / "recipe.jsonl", console)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    wanted = [
        variant
        for variant in variants(case.tokens // 4)
        if variant == DEFAULT or options.factor is None or variant.factor in options.factor
    ]
    measured = []
    for name in options.on or DATA:
        overrides = (f"root={folder / 'quickstart'}",) if options.quick else ()
        data = truth(case, folder / "data") if name == "truth" else quickstart(case, folder / "data", overrides)
        made = measure(case, data, wanted, options.seeds, bench)
        console.print(table(name, made))
        measured += made
        marks.write(options.json, facts(case, options.seeds, measured))
    if not (options.quick or options.on or options.factor):
        PAGE.write_text(page(case, options.seeds, measured))
    return 1 if any(each.failure for each in measured if each.variant == DEFAULT) else 0


def main() -> int:
    """Run the ablation; for the exit code see the module."""
    parser = argparse.ArgumentParser(description="Ablation of the training recipe, one thing at a time.")
    factors = list(dict.fromkeys(variant.factor for variant in variants(1) if variant != DEFAULT))
    parser.add_argument("--quick", action="store_true", help="a tiny case, kept in a --folder alone")
    parser.add_argument("--on", action="append", choices=DATA, help="may be repeated")
    parser.add_argument("--factor", action="append", choices=factors, help="besides the default; may be repeated")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    trainings.options(parser)
    options = parser.parse_args()
    console = Console(width=140)
    with trainings.kept(options) as folder:
        return ablate(options, folder, console)


if __name__ == "__main__":
    sys.exit(main())
