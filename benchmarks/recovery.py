"""What is found of a world whose features are known: ours beside SAELens', on the same rows in the same order.

    python benchmarks/recovery.py [--quick] [--features F ...] [--only NAME ...] [--rates R ...] [--seeds N ...]
                                  [--rows N] [--device cuda --jobs N] [--json FILE]

The world is SynthSAEBench-16k (v2), Chanin and Garriga-Alonso 2026 (arXiv 2602.14687): 16,384 features in 768
dimensions, Zipf frequencies, a hierarchy, correlations; about 34 fire on a row. Its authors train on 200 million rows.
Here it is `--rows`, by default as many as a CPU can be asked for, the same for everybody, so the numbers are those of
short runs, and only compare with each other. k and the batch are theirs.

- `kilobasis`: TopK with the manifest's defaults. `kilobasis-batch`: BatchTopK. `kilobasis-nested`: the same, with
  nested prefixes of an eighth, a quarter and a half. `kilobasis-tree`: parents of 7 children each, a third of k fire.
- `saelens-batch`, `saelens-matryoshka`: those that SynthSAEBench recommends, nested in the same eighths.

Learning rates are searched for everybody alike on the first seed: from `--rates` times its own default, and on beyond
an end of the grid as long as that end has the best F1; the best one is what all seeds are trained with.

F1, MCC and uniqueness are SynthSAEBench's, on held-out rows (see `pipeline/recovery/scores.py`); `found` is the share
of true features that some feature is within cosine 0.9 of. Marks: the best F1 and the best MCC of ours exceed SAELens'
best at every F; exit code 1 where one is missed, or where one of ours fails. Every run is kept as soon as it ends (see
`trainings.py`): start again to go on.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import statistics
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import marks
import numpy as np
import torch
import trainings
from contenders import OURS, ROOT, Contender, missing
from marks import Fact, Mark, fact, spread
from quality import Standing, search
from rich.console import Console
from rich.table import Table
from rows import write
from trainings import Bench, Files, Plan, Result

from pipeline.recovery import summary
from pipeline.recovery.firings import Firings
from pipeline.recovery.matches import links, match
from pipeline.synthetic.directions import pushed_apart, random_directions
from pipeline.synthetic.draws import Split
from pipeline.synthetic.features import parents
from pipeline.synthetic.rows import Active, rows
from pipeline.synthetic.world import WorldSource
from schemas.synthetic import World

OURSELVES = "kilobasis"
SCORES = ("f1", "mcc", "uniqueness", "found_90")
RATES, SEEDS = (0.5, 1.0, 2.0), (0,)
EXTRA = 4
# Rows that are made, and judged, at one time.
SPAN = 8192
# What decides which rows a world has.
CODE = ("pipeline/synthetic", "schemas/synthetic.py", "benchmarks/recovery.py")


@dataclass(frozen=True)
class Entrant:
    """Who, and what of the manifest's `train` differs."""

    contender: Contender
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """How it is called."""
        return self.contender.name


def own(name: str, variant: str, **settings: object) -> Entrant:
    """One of Kilobasis' own."""
    return Entrant(Contender(name, "kilobasis_run.py", variant, OURS), settings)


def entrants(case: Case, features: int) -> list[Entrant]:
    """All of them, for a number of features."""
    nested = [features // 8, features // 4, features // 2]
    parents_on = max(1, case.k // 3)
    return [
        own("kilobasis", "dense"),
        own("kilobasis-batch", "batch"),
        own("kilobasis-nested", "batch", prefixes=nested),
        own(
            "kilobasis-tree",
            f"tree-7-{parents_on}-{2 * parents_on}",
            aux_k=0,
            resample=max(case.batch, case.tokens // 16),
        ),
        Entrant(Contender("saelens-batch", "saelens_batch_run.py", "batch")),
        Entrant(Contender("saelens-matryoshka", "saelens_batch_run.py", "matryoshka")),
    ]


NAMES = ("kilobasis", "kilobasis-batch", "kilobasis-nested", "kilobasis-tree", "saelens-batch", "saelens-matryoshka")


@dataclass(frozen=True)
class Case:
    """How long, and in which world. `features` are those of the dictionaries."""

    world: World
    features: tuple[int, ...] = (4096, 16_384)
    k: int = 25
    batch: int = 1024
    steps: int = 976
    threads: int = 2
    heldout: int = 50_000

    @property
    def tokens(self) -> int:
        """Rows of the stream."""
        return self.steps * self.batch


def full() -> Case:
    """The published world; `rows` are nobody's here."""
    return Case(World.model_validate({"kind": "world", "preset": "synthsaebench-16k-v2", "rows": 1}))


def quick() -> Case:
    """A world that is made and learned in seconds."""
    world = {
        "kind": "world", "rows": 1, "features": 256, "width": 32, "firing": {"exponent": 0.5, "l0": 4.0},
        "hierarchy": {"roots": 16, "branching": 3, "depth": 1},
    }  # fmt: skip
    return Case(World.model_validate(world), (128,), k=4, batch=128, steps=40, heldout=2000)


class Ground:
    """A world's rows as files, and its truth.

    Args:
        case: Which, and how many.
        folder: Where the files go; those that are there are used.
        workers: Make rows, and judge.
    """

    def __init__(self, case: Case, folder: Path, workers: Executor) -> None:
        self._case, self._folder, self._workers = case, folder, workers
        made = hashlib.sha256(repr((case.world, case.tokens, case.heldout)).encode())
        for place in CODE:
            for path in sorted((ROOT / place).rglob("*.py")) if (ROOT / place).is_dir() else [ROOT / place]:
                made.update(path.read_bytes())
        self._world = made.hexdigest()[:16]

    def digest(self, seed: int) -> str:
        """Which rows those of a seed are. The world is the same for all of them."""
        return f"{self._world}-{seed}"

    def files(self, seed: int) -> Files:
        """The stream of a seed, the held-out rows, and who judges what was found."""
        self._folder.mkdir(parents=True, exist_ok=True)
        data, heldout = (self._folder / f"{self._world}-{name}.npy" for name in (f"{seed}-stream", "heldout"))
        truth = self._folder / f"{self._world}-truth.npz"
        if not (heldout.exists() and truth.exists()):
            self._make_truth(heldout, truth)
        if not data.exists():
            unfinished = data.with_suffix(".unfinished")
            np.lib.format.open_memmap(unfinished, "w+", np.int16, (self._case.tokens, self._case.world.width))
            # Another seed's rows lie behind those of the one before.
            fill = functools.partial(filled, unfinished, truth, self._case.world, seed * self._case.tokens)
            list(self._workers.map(fill, range(0, self._case.tokens, SPAN)))
            unfinished.rename(data)
        return Files(
            data, heldout, self.digest(seed), judge=lambda code: self._workers.submit(judged, code, truth).result()
        )

    def _make_truth(self, heldout: Path, truth: Path) -> None:
        world, count = self._case.world, self._case.heldout
        random_MD = random_directions(world.features, world.width, world.seed)
        directions_MD = pushed_apart(random_MD, world.interference.steps, world.interference.learning_rate)
        source = WorldSource(world, directions_MD)
        parts = [rows(source, Split.HELDOUT, at, min(at + SPAN, count)) for at in range(0, count, SPAN)]
        active = Active.joined([part.active for part in parts])
        np.savez(
            truth,
            directions=directions_MD.numpy(),
            parents=parents(world.hierarchy, world.features),
            starts=active.start_N1,
            features=active.feature_E,
        )
        write(heldout, (part.x_ND.bfloat16() for part in parts), count, world.width)


def filled(stream: Path, truth: Path, world: World, before: int, first: int) -> None:
    """Write rows [first, first + SPAN) of a stream, those of the world from `before` on, as far as it has so many."""
    out_ND = np.load(stream, mmap_mode="r+")
    end = min(first + SPAN, len(out_ND))
    source = WorldSource(world, torch.from_numpy(np.load(truth)["directions"]))
    x_ND = rows(source, Split.TRAIN, before + first, before + end).x_ND
    out_ND[first:end] = x_ND.bfloat16().view(torch.int16).numpy()


def judged(code: Path, truth: Path) -> dict[str, float]:
    """The scores of a dictionary, by what it makes of the held-out rows."""
    known, made = np.load(truth), np.load(code)
    parents_M = torch.from_numpy(known["parents"])
    beside = match(torch.from_numpy(made["W_dec"]), torch.from_numpy(known["directions"]))
    linked = links(beside, parents_M if bool((parents_M >= 0).any()) else None)
    z_NK, indices_NK = torch.from_numpy(made["z"]), torch.from_numpy(made["indices"]).long()
    starts_N1, active_E = torch.from_numpy(known["starts"]), torch.from_numpy(known["features"])
    firings = Firings.none(linked)
    for first in range(0, len(z_NK), SPAN):
        span = slice(first, first + SPAN)
        starts_n1 = starts_N1[first : first + SPAN + 1]
        active_e = active_E[int(starts_n1[0]) : int(starts_n1[-1])]
        firings.add(linked, z_NK[span], indices_NK[span], starts_n1 - starts_n1[0], active_e)
    # How often they fired in training is for a table that is not made here.
    metrics = summary.recovery(beside, linked, firings, firings.learned_F > 0, firings.true_M).metrics
    return {name: float(value) for name, value in metrics.items() if value is not None}


def scores(standing: Standing, name: str) -> list[float]:
    """By seed."""
    return [each.more[name] for each in standing.results]


def best_rate(found: Mapping[float, Result]) -> float:
    """The one with the highest F1; of equal ones the lower. What failed has none.

    >>> best_rate({1.0: Result(0.2, more={"f1": 0.5}), 2.0: Result(0.1, more={"f1": 0.5}), 4.0: Result(0.1)})
    1.0
    """
    return max(sorted(found), key=lambda rate: found[rate].more.get("f1", -1.0))


def standing(
    case: Case, features: int, entrant: Entrant, *, options: argparse.Namespace, bench: Bench, ground: Ground
) -> Standing:
    """Train what is missing."""

    def result(rate: float, seed: int) -> Result:
        settings = entrant.settings
        if entrant.name.startswith(OURSELVES):
            settings = {"dead_after": case.tokens // 4} | settings
        shape = (case.world.width, features, case.k, case.batch, case.steps, case.threads, seed)
        plan = Plan(entrant.contender, *shape, rate=rate, settings=settings)
        label = f"F {features}, {entrant.name}, rate x {rate:g}, seed {seed}"
        return bench.result(plan, ground.digest(seed), lambda: ground.files(seed), label)

    extra = 0 if options.quick else EXTRA
    found = search(lambda rate: result(rate, options.seeds[0]), options.rates, extra, best_rate, bench.together)
    rate = best_rate(found)
    return Standing(rate, found, bench.together(lambda seed: result(rate, seed), options.seeds))


Standings = dict[str, Standing]


def shown_as(values: Sequence[float]) -> str:
    """The median, and the range where there is one."""
    return spread(values, 3) if len(values) > 1 else f"{values[0]:.3f}"


def table(case: Case, features: int, seeds: Sequence[int], standings: Standings) -> Table:
    """What a person reads."""
    shown = Table(
        title=f"F {features:,}, k {case.k}, B {case.batch}, {case.tokens:,} rows of {case.world.features:,} features "
        f"in {case.world.width} dimensions: median (range) of {len(seeds)} seeds",
        caption="rate: times the library's default, best F1 of a search (*: no worse one was tried on one side)",
    )
    for heading in ("dictionary", "rate", "F1", "MCC", "unique", "found", "FVU", "dead", "s"):
        shown.add_column(heading, justify="left" if heading == "dictionary" else "right", no_wrap=True)
    for name, each in standings.items():
        if each.failure is not None:
            shown.add_row(name, f"{each.rate:g}", f"failed: {each.failure}"[:60], *[""] * 6)
            continue
        shown.add_row(
            name,
            f"{each.rate:g}" + ("" if each.inside else "*"),
            *(shown_as(scores(each, score)) for score in SCORES),
            shown_as([result.fvu for result in each.results]),
            shown_as([result.dead for result in each.results]),
            f"{statistics.median(result.seconds for result in each.results):.0f}",
        )
    return shown


def facts(case: Case, features: int, seeds: Sequence[int], standings: Standings) -> list[Fact]:
    """What a program reads."""
    found = []
    for name, each in standings.items():
        config = dataclasses.asdict(case) | {"world": case.world.model_dump(mode="json"), "features": features}
        config |= {"dictionary": name, "seeds": list(seeds), "rate": each.rate}
        prefix = f"recovery/{features}/{name}"
        if each.failure is not None:
            found.append(fact(f"{prefix}/failed", [1.0], "count", config | {"reason": each.failure}))
            continue
        found += [fact(f"{prefix}/{score}", scores(each, score), "fraction", config) for score in SCORES]
        found.append(fact(f"{prefix}/fvu", [result.fvu for result in each.results], "fraction", config))
    return found


def compared(features: int, standings: Standings) -> list[Mark]:
    """The marks at a number of features: the best of ours over the best of theirs."""
    made = []
    for score in ("f1", "mcc"):
        ours, theirs = (
            [
                statistics.median(scores(each, score))
                for name, each in standings.items()
                if name.startswith(OURSELVES) == mine and not each.failure
            ]
            for mine in (True, False)
        )
        if any(not name.startswith(OURSELVES) for name in standings):
            value = max(ours) / max(theirs) if ours and theirs else None
            made.append(Mark(f"F {features}: best {score.upper()}, by SAELens'", value, "at least", 1.0))
    return made


def compare(options: argparse.Namespace, folder: Path, console: Console) -> int:
    """Train what is missing, and report."""
    case = quick() if options.quick else full()
    if options.rows:
        case = dataclasses.replace(case, steps=options.rows // case.batch)
    bench = Bench.of(options, folder / "recovery.jsonl", console)
    found, made, failed = list[Fact](), list[Mark](), False
    with ProcessPoolExecutor(mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        ground = Ground(case, folder / "data", pool)
        for features in options.features or case.features:
            wanted = [each for each in entrants(case, features) if options.only is None or each.name in options.only]
            train = functools.partial(standing, case, features, options=options, bench=bench, ground=ground)
            standings = dict(zip((each.name for each in wanted), bench.together(train, wanted), strict=True))
            console.print(table(case, features, options.seeds, standings))
            failed = failed or any(each.failure for name, each in standings.items() if name.startswith(OURSELVES))
            found += facts(case, features, options.seeds, standings)
            made += compared(features, standings)
            # A long run that is broken off leaves the sizes that it finished.
            marks.write(options.json, found)
    missed = marks.show([] if options.quick else made, console)
    return 1 if missed or failed else 0


def main() -> int:
    """Run the comparison; for the exit code see the module."""
    parser = argparse.ArgumentParser(description="What dictionaries find of a world whose features are known.")
    parser.add_argument("--quick", action="store_true", help="a tiny world, kept in a --folder alone; without marks")
    parser.add_argument("--features", type=int, action="append", help="of the dictionaries; may be repeated")
    parser.add_argument("--only", action="append", choices=NAMES, help="may be repeated")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="times each default; the search's start")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="rates are searched on the first")
    parser.add_argument("--rows", type=int, help="that everybody trains on, in whole batches; 999,424 if left out")
    trainings.options(parser)
    options = parser.parse_args()
    console = Console(width=140)
    if wrong := missing(
        each.contender for each in entrants(quick(), 128) if not options.only or each.name in options.only
    ):
        parser.error(wrong)
    with trainings.kept(options) as folder:
        return compare(options, folder, console)


if __name__ == "__main__":
    sys.exit(main())
