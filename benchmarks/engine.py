"""What DeepSpeed costs, and what its ZeRO buys.

    python benchmarks/engine.py [--quick] [--json FILE]

`cost`: a training step with the engine over the same step without it, on one rank. Both sides are the trainer's own
`Trainer.step`, with the same objective and the same optimizer on the same batches; on one of them a few lines stand in
the place of the engine (`Plain`): call the module, go backward, clip, step. Both live in one process and take turns,
step by step, so that a slow moment falls on both. The mark is on CPU time of the process, in which other processes'
turns on the core do not count.

`zero`: dense Adam on two ranks that talk over gloo, at every stage, with the optimizer's state offloaded and without.
Bytes are those of all tensors that a rank holds between backward and step, by what they are for; times are over those
of stage 0 in the same round. On a CPU offloading moves nothing: what it costs there is its own bookkeeping.

Exit code 1 where the mark is missed.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self
from unittest import mock

import marks
import torch
import torch.multiprocessing as processes
from marks import Fact, Mark, fact, spread
from rich.console import Console
from rich.table import Table
from synthetic import GroundTruth

from cluster import rendezvous
from pipeline.dictionary.model import TopKDictionary
from pipeline.dictionary.parallel import Dense, joined
from pipeline.dictionary.ranks import Ranks
from pipeline.dictionary.trainer import Trainer
from schemas.training import Train

# Of a step.
LIMIT = 0.05
STEPS = 10**6
WAYS = (Dense(), Dense(1), Dense(2), Dense(3), Dense(1, "cpu"), Dense(2, "cpu"), Dense(3, "cpu"))
OPTIMIZERS = ("row_adam", "adam")
PARTS = ("weights", "moments", "gradients")


@dataclass(frozen=True)
class Case:
    """What is trained: `rounds` turns of `steps` steps, behind `warmup` ones."""

    width: int
    features: int
    k: int
    batch: int
    threads: int
    warmup: int
    rounds: int
    steps: int


COST = Case(384, 6144, k=32, batch=4096, threads=1, warmup=3, rounds=120, steps=1)
ZERO = Case(384, 12288, k=32, batch=2048, threads=1, warmup=1, rounds=5, steps=2)
QUICK_COST = Case(64, 1024, k=16, batch=512, threads=1, warmup=1, rounds=3, steps=2)
QUICK_ZERO = Case(64, 1024, k=16, batch=512, threads=1, warmup=1, rounds=1, steps=1)


class Plain:
    """The engine's part of a step on one rank, as plain PyTorch. A context manager, as the engine is."""

    shards = False

    def __init__(
        self,
        module: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        batch: int,
        clip: float,
        ranks: Ranks,
        dense: Dense | None = None,
    ) -> None:
        assert ranks.world_size == 1
        self._module, self._optimizer, self._clip = module, optimizer, clip
        self._trained = [each for each in module.parameters() if each.requires_grad]
        self.device = self._trained[0].device

    def __call__(self, *args: Any) -> Any:
        """The module's forward pass."""
        return self._module(*args)

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients."""
        loss.backward()

    def gradient_norm(self) -> float:
        """Of the whole gradient."""
        return float(
            torch.stack([each.grad.square().sum() for each in self._trained if each.grad is not None]).sum().sqrt()
        )

    def step(self) -> bool:
        """Clip and update."""
        if self._clip:
            torch.nn.utils.clip_grad_norm_(self._trained, self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing was begun."""


def batches(case: Case) -> list[torch.Tensor]:
    """A few batches. Shape (B, D) each."""
    made = GroundTruth(case.width, seed=0).sample(4, case.batch, seed=0)
    return [torch.from_numpy(x_BD) for x_BD in made]


def trainer(case: Case, optimizer: str, ranks: Ranks, dense: Dense) -> Trainer:
    """One that is ready to step. No feature counts as dead: how many do would depend on the steps so far."""
    dictionary = TopKDictionary(case.width, case.features, case.k)
    dictionary.initialize(batches(case)[0], 0, ranks)
    settings = Train(tokens=STEPS * case.batch, batch=case.batch, warmup=0.0, optimizer=optimizer)  # type: ignore[arg-type]
    return Trainer(dictionary, settings, STEPS, ranks, dense)


class Seconds(NamedTuple):
    """Of a step, by the clock and of the CPU."""

    wall: float
    cpu: float


def turn(of: Trainer, share_NBD: Sequence[torch.Tensor], begin: int, steps: int) -> Seconds:
    """Time some steps."""
    began, began_cpu = time.perf_counter(), time.process_time()
    for step in range(begin, begin + steps):
        of.step(step, share_NBD[step % len(share_NBD)])
    return Seconds((time.perf_counter() - began) / steps, (time.process_time() - began_cpu) / steps)


def cost(case: Case, optimizer: str) -> list[tuple[Seconds, Seconds]]:
    """A step with the engine and one without it, of each round."""
    torch.set_num_threads(case.threads)
    x_NBD, found = batches(case), []
    with joined(0, 1, 1, rendezvous.hold("127.0.0.1")) as ranks:
        with_engine = trainer(case, optimizer, ranks, Dense())
        with mock.patch("pipeline.dictionary.trainer.Engine", Plain):
            without = trainer(case, optimizer, ranks, Dense())
        sides = (with_engine, without)
        with with_engine.engine, without.engine:
            for each in sides:
                turn(each, x_NBD, 0, case.warmup)
            for index in range(case.rounds):
                # Who goes first alternates.
                begin = case.warmup + index * case.steps
                pair = {
                    id(each): turn(each, x_NBD, begin, case.steps) for each in (sides if index % 2 else sides[::-1])
                }
                found.append((pair[id(with_engine)], pair[id(without)]))
    return found


def held(of: Trainer, before: set[int]) -> dict[str, int]:
    """Bytes of a rank's tensors that were not there before, by what they are for."""
    gc.collect()
    storages: dict[int, int] = {}
    for each in gc.get_objects():
        if type(each) in (torch.Tensor, torch.nn.Parameter) and not each.is_meta:
            storage = each.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    moments = {value.untyped_storage().data_ptr() for state in of.optimizer.state.values() for value in state.values()}
    weights = {each.data.untyped_storage().data_ptr() for each in of.dictionary.parameters()}
    weights |= {each.untyped_storage().data_ptr() for each in of.optimizer.state}
    made = {"weights": weights, "moments": moments, "gradients": storages.keys() - weights - moments - before}
    return {name: sum(storages.get(place, 0) for place in places) for name, places in made.items()}


def storages_now() -> set[int]:
    """Where the tensors are that are there."""
    gc.collect()
    return {
        each.untyped_storage().data_ptr()
        for each in gc.get_objects()
        if type(each) in (torch.Tensor, torch.nn.Parameter) and not each.is_meta
    }


def zero_rank(index: int, case: Case, init_method: str, ways: Sequence[Dense], folder: Path) -> None:
    """One rank: every way in turn; leaves the seconds of a step and the bytes."""
    torch.set_num_threads(case.threads)
    found = []
    for dense in ways:
        with joined(index, 2, 1, init_method) as ranks:
            share = case.batch // 2
            x_NBD = [x_BD[index * share : (index + 1) * share].clone() for x_BD in batches(case)]
            before = storages_now()
            of = trainer(case, "adam", ranks, dense)
            with of.engine:
                turn(of, x_NBD, 0, case.warmup)
                seconds = turn(of, x_NBD, case.warmup, case.steps).wall
                bytes_: dict[str, int] = {}
                inner = of.engine.step

                def step(of: Trainer = of, before: set[int] = before, inner: Any = inner, bytes_: Any = bytes_) -> bool:
                    bytes_ |= held(of, before)
                    return bool(inner())

                with mock.patch.object(of.engine, "step", step):
                    turn(of, x_NBD, 0, 1)
            found.append((seconds, bytes_))
            del of
            # Where to meet for the next way: a port that is held from now on.
            (init_method, _) = ranks.texts(rendezvous.hold("127.0.0.1") if index == 0 else "")
    torch.save(found, folder / f"{index}.pt")


def zero(case: Case) -> dict[Dense, list[tuple[float, dict[str, int]]]]:
    """Seconds of a step and bytes of the rank that holds most, of each way and round."""
    made: dict[Dense, list[tuple[float, dict[str, int]]]] = {dense: [] for dense in WAYS}
    for _ in range(case.rounds):
        with tempfile.TemporaryDirectory() as folder:
            meeting = rendezvous.hold("127.0.0.1")
            # Rank 0 is another process.
            rendezvous.release(meeting)
            processes.spawn(zero_rank, (case, meeting, WAYS, Path(folder)), nprocs=2, join=True)
            every = [torch.load(Path(folder) / f"{index}.pt") for index in range(2)]
        for dense, *ranks in zip(WAYS, *every, strict=True):
            seconds = max(each for each, _ in ranks)
            made[dense].append((seconds, max((each for _, each in ranks), key=lambda each: sum(each.values()))))
    return made


def name(dense: Dense) -> str:
    """Of a way, for people.

    >>> name(Dense()), name(Dense(2, "cpu"))
    ('ZeRO 0', 'ZeRO 2, offloaded')
    """
    return f"ZeRO {dense.stage}" + (", offloaded" if dense.offload == "cpu" else "")


def main() -> int:
    """Measure both; exit code 1 where the engine costs more than the limit."""
    parser = argparse.ArgumentParser(description="Cost of the DeepSpeed engine, and what ZeRO buys.")
    parser.add_argument("--quick", action="store_true", help="small cases and few rounds; without marks")
    parser.add_argument("--json", type=Path, help="write a list of {name, value, unit, config}")
    options = parser.parse_args()
    case, sharded = (QUICK_COST, QUICK_ZERO) if options.quick else (COST, ZERO)
    console, found, made = Console(width=120), list[Fact](), list[Mark]()
    table = Table(title=f"a step with the engine over one without, one rank, F {case.features}")
    for heading in ("optimizer", "engine CPU s", "plain CPU s", "CPU times (range)", "times (range)"):
        table.add_column(heading)
    for optimizer in OPTIMIZERS:
        pairs = cost(case, optimizer)
        sides = [statistics.median(each.cpu for each in side) for side in zip(*pairs, strict=True)]
        walls = [engine.wall / plain.wall for engine, plain in pairs]
        ratios = [engine.cpu / plain.cpu for engine, plain in pairs]
        table.add_row(optimizer, *(f"{each:.4f}" for each in sides), spread(ratios, 3), spread(walls, 3))
        found.append(fact(f"engine/{optimizer}/times", walls, "engine / plain", asdict(case)))
        found.append(fact(f"engine/{optimizer}/cpu_times", ratios, "engine / plain", asdict(case)))
        made.append(Mark(f"engine {optimizer}, CPU", statistics.median(ratios), "at most", 1 + LIMIT))
    console.print(table)
    ways = zero(sharded)
    numbers = (2 * sharded.width + 1) * sharded.features + sharded.width
    table = Table(title=f"bytes for each of {numbers:,} parameters, and time of a step, two ranks, dense Adam")
    for heading in ("", *PARTS, "all", "times stage 0 (range)"):
        table.add_column(heading)
    for dense, rounds in ways.items():
        bytes_ = {part: statistics.median(each[part] for _, each in rounds) for part in PARTS}
        times = [seconds / first for (seconds, _), (first, _) in zip(rounds, ways[Dense()], strict=True)]
        columns = [f"{each / numbers:.2f}" for each in (*bytes_.values(), sum(bytes_.values()))]
        table.add_row(name(dense), *columns, spread(times))
        config = asdict(sharded) | {"stage": dense.stage, "offload": dense.offload}
        label = f"engine/zero{dense.stage}{'-cpu' if dense.offload == 'cpu' else ''}"
        found.append(fact(f"{label}/times", times, "step / step of stage 0", config))
        found += [
            fact(f"{label}/{part}", [each[part] for _, each in rounds], "bytes of a rank", config) for part in PARTS
        ]
    console.print(table)
    marks.write(options.json, found)
    return marks.show([] if options.quick else made, console)


if __name__ == "__main__":
    sys.exit(main())
