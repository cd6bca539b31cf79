"""Trainer speed beside the peers': whole optimizer steps per second, in tokens, on the same batches.

    python benchmarks/train.py [--quick] [--only NAME ...] [--json FILE]

Every contender runs in its own process, in the environment of its library (`.venv-peers` for the peers'),
and runs its library's own step: forward, loss, backward, clipping, optimizer, projection of the decoder,
bookkeeping of dead features, with that library's defaults. All processes are alive at once and take
turns: one runs a few steps while the others sleep. A slow minute of the machine so falls on all of them,
and the ratio to Kilobasis is taken within each round. A contender whose error does not fall is reported.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
OURS, PEERS = Path(sys.executable), ROOT / ".venv-peers" / "bin" / "python"

REFERENCE = "kilobasis"
PATIENCE = 900.0
SEED = 0

# Of the synthetic activations.
DIRECTIONS, ACTIVE, NOISE, FREQUENCY_EXPONENT = 8192, 24, 0.05, 0.7


@dataclass(frozen=True)
class Contender:
    """A library, or one way of using it."""

    name: str
    script: str
    variant: str
    python: Path = PEERS


CONTENDERS = (
    Contender(REFERENCE, "kilobasis_step.py", "adam", OURS),
    Contender("saelens", "saelens_step.py", "dense"),
    Contender("saelens-sparse", "saelens_step.py", "sparse"),
    Contender("sparsify", "sparsify_step.py", "signum"),
    Contender("sparsify-adam", "sparsify_step.py", "adam"),
    Contender("dictionary_learning", "dictionary_learning_step.py", "adam"),
)


@dataclass(frozen=True)
class Case:
    """What is trained, and for how long: `rounds` turns of `steps` steps for every contender."""

    width: int
    features: int
    k: int
    batch: int
    threads: int
    warmup: int
    rounds: int
    steps: int
    batches: int = 16


CASES = (
    Case(width=384, features=6144, k=32, batch=2048, threads=2, warmup=3, rounds=7, steps=6),
    Case(width=384, features=24576, k=32, batch=2048, threads=2, warmup=2, rounds=7, steps=3),
)
QUICK = (Case(width=384, features=3072, k=32, batch=1024, threads=2, warmup=2, rounds=3, steps=4, batches=8),)


@dataclass
class Outcome:
    """One contender's turns. `fvus` starts behind the warm-up."""

    tokens_per_s: list[float] = field(default_factory=list)
    tokens_per_cpu_s: list[float] = field(default_factory=list)
    fvus: list[float] = field(default_factory=list)
    peak_rss: int = 0

    @property
    def learns(self) -> bool:
        """Whether the held-out error fell."""
        return self.fvus[-1] < self.fvus[0]


class Worker:
    """A contender's process. A context manager."""

    def __init__(self, contender: Contender, case: Case, data: Path, log: Path) -> None:
        self.name, self._log = contender.name, log
        shape = {name: getattr(case, name) for name in ("width", "features", "k", "batch", "threads")}
        read_end, write_end = os.pipe()
        setting = shape | {"seed": SEED, "variant": contender.variant, "data": str(data), "answers": write_end}
        environment = os.environ | {
            "OMP_NUM_THREADS": str(case.threads),
            "CUDA_VISIBLE_DEVICES": "",
            "DS_ACCELERATOR": "cpu",
            "WANDB_MODE": "disabled",
            "HF_HUB_OFFLINE": "1",
        }
        self._answers = os.fdopen(read_end, "rb")
        with open(log, "wb") as stream:
            self._process = subprocess.Popen(
                [str(contender.python), str(HERE / "peers" / contender.script), json.dumps(setting)],
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=stream,
                env=environment,
                pass_fds=[write_end],
                # Some trainers leave folders where they run.
                cwd=data.parent,
            )
        os.close(write_end)

    def turn(self, steps: int) -> dict[str, float]:
        """Run steps; returns the fields of `peers.protocol.Turn`.

        Raises:
            RuntimeError: the worker died or is silent; the message ends with the end of its log.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{steps}\n".encode())
            self._process.stdin.flush()
            ready, _, _ = select.select([self._answers], [], [], PATIENCE)
            line = self._answers.readline() if ready else b""
        except BrokenPipeError:
            line = b""
        if not line:
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-12:])
            raise RuntimeError(f"{self.name} did not answer; its log ends with\n{tail}")
        answer: dict[str, float] = json.loads(line)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(timeout=10 if kind is None else 1)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        finally:
            self._answers.close()


def activations(case: Case) -> npt.NDArray[np.float32]:
    """Batches that a sparse dictionary can explain: a few of many random directions, and noise.

    How often a direction is active falls with a power of its rank, as features of a model do; its weight is
    exponential. The variance sums to the width. Shape (batches + 1, B, D).
    """
    random = np.random.default_rng(SEED)
    directions_MD = random.standard_normal((DIRECTIONS, case.width), dtype=np.float32)
    directions_MD /= np.linalg.norm(directions_MD, axis=1, keepdims=True)
    frequencies = np.arange(1.0, DIRECTIONS + 1) ** -FREQUENCY_EXPONENT
    frequencies /= frequencies.sum()
    x_NBD = np.empty((case.batches + 1, case.batch, case.width), np.float32)
    for x_BD in x_NBD:
        active_BA = random.choice(DIRECTIONS, (case.batch, ACTIVE), p=frequencies)
        weights_BA = random.exponential(size=(case.batch, ACTIVE)).astype(np.float32)
        np.einsum("ba,bad->bd", weights_BA, directions_MD[active_BA], out=x_BD)
        x_BD += NOISE * random.standard_normal(x_BD.shape, dtype=np.float32)
    return x_NBD * np.float32(np.sqrt(case.width / x_NBD.var(axis=(0, 1)).sum()))


def compete(case: Case, contenders: Sequence[Contender], console: Console) -> dict[str, Outcome]:
    """Let the contenders take turns."""
    outcomes = {contender.name: Outcome() for contender in contenders}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        data = folder / "activations.npy"
        np.save(data, activations(case))
        workers = []
        # Started one after another, so that no warm-up disturbs another's.
        for contender in contenders:
            worker = stack.enter_context(Worker(contender, case, data, folder / f"{contender.name}.log"))
            outcomes[contender.name].fvus.append(worker.turn(case.warmup)["fvu"])
            workers.append(worker)
        for index in range(case.rounds):
            console.print(f"F {case.features}: round {index + 1} of {case.rounds}", style="dim")
            first = index % len(workers)
            for worker in workers[first:] + workers[:first]:
                made, outcome = worker.turn(case.steps), outcomes[worker.name]
                outcome.tokens_per_s.append(case.steps * case.batch / made["seconds"])
                outcome.tokens_per_cpu_s.append(case.steps * case.batch / made["cpu_seconds"])
                outcome.fvus.append(made["fvu"])
                outcome.peak_rss = int(made["peak_rss"])
    return outcomes


def speedups(outcomes: dict[str, Outcome], name: str, measure: str) -> list[float]:
    """Kilobasis' rate over another's, round by round; above 1, Kilobasis is faster."""
    ours, theirs = getattr(outcomes[REFERENCE], measure), getattr(outcomes[name], measure)
    return [our / their for our, their in zip(ours, theirs, strict=True)]


def table(case: Case, outcomes: dict[str, Outcome]) -> Table:
    """What a person reads."""
    shown = Table(
        title=f"d {case.width}, F {case.features}, k {case.k}, B {case.batch}, float32, {case.threads} threads: "
        f"median of {case.rounds} rounds of {case.steps} steps",
        caption="times: how many times faster Kilobasis is, by the clock, then by CPU time; RSS: peak, in MiB",
    )
    for heading in ("trainer", "tokens/s", "times (range)", "CPU", "RSS", "FVU"):
        shown.add_column(heading, justify="left" if heading == "trainer" else "right", no_wrap=True)
    for name, outcome in outcomes.items():
        clock, cpu = (speedups(outcomes, name, measure) for measure in ("tokens_per_s", "tokens_per_cpu_s"))
        peer = name != REFERENCE
        shown.add_row(
            name,
            f"{statistics.median(outcome.tokens_per_s):,.0f}",
            f"{statistics.median(clock):.2f} ({min(clock):.2f}..{max(clock):.2f})" if peer else "",
            f"{statistics.median(cpu):.2f}" if peer else "",
            f"{outcome.peak_rss / 2**20:,.0f}",
            f"{outcome.fvus[-1]:.3f}" + ("" if outcome.learns else " does not fall"),
        )
    return shown


def facts(case: Case, outcomes: dict[str, Outcome]) -> list[dict[str, Any]]:
    """What a program reads."""
    found = []
    for name, outcome in outcomes.items():
        measured: list[tuple[str, Sequence[float], str]] = [
            ("tokens_per_s", outcome.tokens_per_s, "tokens/s"),
            ("tokens_per_cpu_s", outcome.tokens_per_cpu_s, "tokens/CPU-s"),
            ("peak_rss", [outcome.peak_rss], "bytes"),
            ("fvu", outcome.fvus[-1:], "fraction"),
        ]
        if name != REFERENCE:
            unit = "kilobasis / contender"
            measured.append(("speedup", speedups(outcomes, name, "tokens_per_s"), unit))
            measured.append(("cpu_speedup", speedups(outcomes, name, "tokens_per_cpu_s"), unit))
        found += [
            {
                "name": f"train/F{case.features}/{name}/{what}",
                "value": statistics.median(values),
                "unit": unit,
                "config": {"contender": name, **asdict(case), "per_round": list(values)},
            }
            for what, values, unit in measured
        ]
    return found


def main() -> int:
    """Run every case; exit code 1 where a contender did not learn."""
    parser = argparse.ArgumentParser(description="Trainer tokens/s of Kilobasis and of its peers, interleaved.")
    names = [contender.name for contender in CONTENDERS]
    parser.add_argument("--quick", action="store_true", help="a small case and few rounds")
    parser.add_argument("--only", action="append", choices=names, help=f"besides {REFERENCE}; may be repeated")
    parser.add_argument("--features", type=int, help="only the case with this F")
    parser.add_argument("--json", type=Path, help="write a list of {name, value, unit, config}")
    options = parser.parse_args()
    wanted = {REFERENCE, *(options.only or names)}
    contenders = [contender for contender in CONTENDERS if contender.name in wanted]
    if any(not contender.python.exists() for contender in contenders):
        parser.error(f"{PEERS} is not there; make it with `make .venv-peers`, or take --only {REFERENCE}")
    console, found, learned = Console(width=120), [], True
    for case in QUICK if options.quick else CASES:
        if options.features not in (None, case.features):
            continue
        outcomes = compete(case, contenders, console)
        console.print(table(case, outcomes))
        found += facts(case, outcomes)
        learned = learned and all(outcome.learns for outcome in outcomes.values())
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if learned else 1


if __name__ == "__main__":
    sys.exit(main())
