"""Contenders take turns on the same batches: their processes, the guard on their memory, the rounds.

Two ways. In a case whose contenders fit together, all processes are alive at once: one runs a few steps while the
others sleep. In a larger one they are alive one at a time: each round starts each of them afresh, warms it up and times
it, so that each has the whole allowance of memory. Either way a slow minute of the machine falls on all of them, and
ratios are taken within each round.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, TypeVar

import numpy as np
import psutil
from contenders import Contender, environment, last_words
from synthetic import GroundTruth

# Of all contenders together, and how often it is looked at, in seconds.
MEMORY = 12 * 10**9
WATCH = 0.1
# A contender that has not answered in so many seconds will not.
PATIENCE = 1800.0
SEED = 0

T = TypeVar("T")


@dataclass(frozen=True)
class Case:
    """What is trained, and for how long: `rounds` turns of `steps` steps, behind `warmup` ones.

    `alive` says whether all processes live through all rounds, or one at a time.
    """

    width: int
    expansion: int
    k: int
    batch: int
    threads: int
    warmup: int
    rounds: int
    steps: int
    alive: Literal["all", "one"] = "all"
    batches: int = 8
    device: str = "cpu"

    @property
    def features(self) -> int:
        """F."""
        return self.width * self.expansion

    @property
    def name(self) -> str:
        """How it is chosen on the command line.

        >>> Case(384, 16, 32, 4096, 2, 1, 1, 1).name
        'd384x16'
        """
        return f"d{self.width}x{self.expansion}"


@dataclass
class Outcome:
    """One contender's turns, one entry a round; `began` and `ended` are held-out errors, `traffic` the last turn's.

    `failure` says in a line why it has fewer rounds than there were.
    """

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    began: float = float("nan")
    ended: float = float("nan")
    peak_rss: int = 0
    traffic: float = float("nan")
    failure: str | None = None

    @property
    def learns(self) -> bool:
        """Whether the held-out error fell behind the warm-up."""
        return self.ended < self.began


class FailedContenderError(Exception):
    """A contender's process is dead, silent or too large. The message is the reason, in a line."""


class Guard:
    """Watches the memory of all workers that are alive. Resident sets are what `peak_rss` counts as well."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.workers: list[psutil.Process] = []

    def exceeded(self) -> bool:
        """Whether they hold more than the limit."""
        held = 0
        for worker in self.workers:
            try:
                held += worker.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        return held > self.limit


class Worker:
    """A contender's process. A context manager."""

    def __init__(self, contender: Contender, case: Case, data: Path, guard: Guard) -> None:
        self.name, self._guard = contender.name, guard
        self._log = data.parent / f"{contender.name}.log"
        shape = {name: getattr(case, name) for name in ("width", "features", "k", "batch", "threads", "device")}
        read_end, write_end = os.pipe()
        setting = shape | {"seed": SEED, "variant": contender.variant, "data": str(data), "answers": write_end}
        self._answers = os.fdopen(read_end, "rb")
        with open(self._log, "wb") as stream:
            self._process = subprocess.Popen(
                contender.command(json.dumps(setting)),
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=stream,
                env=environment(case.threads, case.device),
                pass_fds=[write_end],
                # Some trainers leave folders where they run.
                cwd=data.parent,
            )
        os.close(write_end)
        self._watched = psutil.Process(self._process.pid)
        guard.workers.append(self._watched)

    def turn(self, steps: int) -> dict[str, float]:
        """Run steps; returns the fields of `peers.protocol.Turn`.

        Raises:
            FailedContenderError: there will be no answer.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{steps}\n".encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise FailedContenderError(self._reason()) from None
        line = self._answer()
        if not line:
            raise FailedContenderError(self._reason())
        answer: dict[str, float] = json.loads(line)
        return answer

    def _answer(self) -> bytes:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if select.select([self._answers], [], [], WATCH)[0]:
                return self._answers.readline()
            if self._guard.exceeded():
                self._end()
                raise FailedContenderError(f"needs more than {self._guard.limit / 1e9:.0f} GB of memory")
        raise FailedContenderError(f"did not answer in {PATIENCE:.0f} s")

    def _reason(self) -> str:
        code = self._process.wait()
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return f"exit code {code}: {last_words(self._log)}"

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()

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
            self._end()
        finally:
            self._answers.close()
            self._guard.workers.remove(self._watched)


def race(
    case: Case,
    contenders: Sequence[Contender],
    tell: Callable[[str], None],
    limit: int = MEMORY,
    expansions: Mapping[str, int] | None = None,
) -> dict[str, Outcome]:
    """Let the contenders take turns. One that fails is out, the others go on.

    Args:
        case: What is trained.
        contenders: Who trains it.
        tell: Gets a line for every round.
        limit: Bytes of all contenders together.
        expansions: Of contenders that train another number of features, by their names.
    """
    outcomes = {contender.name: Outcome() for contender in contenders}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "activations.npy"
        np.save(data, GroundTruth(case.width, seed=SEED).sample(case.batches + 1, case.batch, SEED))
        run = {"all": _side_by_side, "one": _one_at_a_time}[case.alive]
        run(case, contenders, data, outcomes, tell, Guard(limit), expansions or {})
    return outcomes


def _side_by_side(
    case: Case,
    contenders: Sequence[Contender],
    data: Path,
    outcomes: dict[str, Outcome],
    tell: Callable[[str], None],
    guard: Guard,
    expansions: Mapping[str, int],
) -> None:
    with ExitStack() as stack:
        # They start together, and warm up one after another, so that no warm-up disturbs another's.
        started = [
            stack.enter_context(Worker(contender, _own(case, contender, expansions), data, guard))
            for contender in contenders
        ]
        workers = [worker for worker in started if _attempt(worker, case.warmup, outcomes[worker.name], warming=True)]
        for index in range(case.rounds):
            tell(f"{case.name}: round {index + 1} of {case.rounds}")
            for worker in _rotated(workers, index):
                if not _attempt(worker, case.steps, outcomes[worker.name]):
                    workers.remove(worker)


def _one_at_a_time(
    case: Case,
    contenders: Sequence[Contender],
    data: Path,
    outcomes: dict[str, Outcome],
    tell: Callable[[str], None],
    guard: Guard,
    expansions: Mapping[str, int],
) -> None:
    left = list(contenders)
    for index in range(case.rounds):
        for contender in _rotated(left, index):
            tell(f"{case.name}: round {index + 1} of {case.rounds}, {contender.name}")
            outcome = outcomes[contender.name]
            with Worker(contender, _own(case, contender, expansions), data, guard) as worker:
                made = _attempt(worker, case.warmup, outcome, warming=True)
                if not (made and _attempt(worker, case.steps, outcome)):
                    left.remove(contender)


def _own(case: Case, contender: Contender, expansions: Mapping[str, int]) -> Case:
    return replace(case, expansion=expansions.get(contender.name, case.expansion))


def _rotated(items: Sequence[T], by: int) -> list[T]:
    """A copy that begins elsewhere, so that nobody is always first."""
    first = by % max(1, len(items))
    return [*items[first:], *items[:first]]


def _attempt(worker: Worker, steps: int, outcome: Outcome, warming: bool = False) -> bool:
    """Let a worker run, and keep what it says; False where it failed."""
    try:
        made = worker.turn(steps)
    except FailedContenderError as error:
        outcome.failure = str(error)
        return False
    outcome.peak_rss = max(outcome.peak_rss, int(made["peak_rss"]))
    if warming:
        outcome.began = made["fvu"]
        return True
    outcome.ended, outcome.traffic = made["fvu"], made["traffic"]
    outcome.seconds.append(made["seconds"] / steps)
    outcome.cpu_seconds.append(made["cpu_seconds"] / steps)
    return True


def settings(case: Case) -> dict[str, object]:
    """The case as a program reads it."""
    return asdict(case) | {"features": case.features}
