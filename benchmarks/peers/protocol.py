"""What `benchmarks/train.py` and its workers say to each other, and how a worker is timed.

A worker is a script beside this file, run by the interpreter of the environment that holds its library.
Its one argument is a `Setting` as JSON. On stdin it gets a number of steps a line; after those steps it
answers with a `Turn` as one line of JSON, and sleeps until the next line. Stdin at its end ends it. Answers
have a pipe of their own, because libraries print to stdout as they please.

Standalone: torch and numpy only, so that it runs in both environments.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

PROBE_ROWS = 512


@dataclasses.dataclass(frozen=True)
class Setting:
    """One contender's task.

    `data` is a .npy file of shape (batches, B, width), float32; its last batch is held out. `variant`
    chooses between ways of one library, for example its optimizers. `answers` is the descriptor of the pipe.
    """

    width: int
    features: int
    k: int
    batch: int
    threads: int
    seed: int
    variant: str
    data: str
    answers: int
    device: str = "cpu"


@dataclasses.dataclass(frozen=True)
class Turn:
    """What a worker did since its last answer.

    `cpu_seconds` counts all threads of the process: on a machine with other work it is steadier than the clock.
    `fvu` is the fraction of variance unexplained of held-out rows behind these steps, measured outside
    the timed part; `peak_rss` the process's largest resident memory so far, in bytes, or on a GPU the most that
    torch has held there. `traffic` is what the optimizer read and wrote in the last step, in bytes: gradients,
    weights and its own state; no number where the worker does not say.
    """

    steps: int
    seconds: float
    cpu_seconds: float
    fvu: float
    peak_rss: int
    traffic: float


class Session:
    """A worker's side of the talk. Made before anything else, because it sets threads and the seed."""

    def __init__(self) -> None:
        self.setting = Setting(**json.loads(sys.argv[1]))
        self._answers = os.fdopen(self.setting.answers, "w", buffering=1)
        torch.set_num_threads(self.setting.threads)
        torch.manual_seed(self.setting.seed)
        self.device = torch.device(self.setting.device)
        x_NBD = torch.from_numpy(np.load(self.setting.data)).to(self.device)
        self._x_NBD, self._probe_BD = x_NBD[:-1], x_NBD[-1, :PROBE_ROWS]
        # A worker that knows says it here; see `Turn`.
        self.traffic: Callable[[], float] = lambda: float("nan")

    @property
    def sample(self) -> torch.Tensor:
        """A batch to start a dictionary from. Shape (B, D)."""
        return self._x_NBD[0]

    def batches(self, reconstruct: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[torch.Tensor]:
        """Batches of shape (B, D), for as long as the orchestrator asks for steps.

        Taking the next batch says that the step on the one before has ended. Where the turn is over, taking
        it answers, and blocks until the next turn.

        Args:
            reconstruct: (B, D) to its reconstruction, for `Turn.fvu`.
        """
        turn = 0
        for line in sys.stdin:
            steps = int(line)
            began, began_cpu = self.now(), time.process_time()
            for _ in range(steps):
                yield self._x_NBD[turn % len(self._x_NBD)].clone()
                turn += 1
            seconds, cpu_seconds = self.now() - began, time.process_time() - began_cpu
            done = Turn(steps, seconds, cpu_seconds, self._fvu(reconstruct), self._peak(), self.traffic())
            self._answers.write(json.dumps(dataclasses.asdict(done)) + "\n")

    def now(self) -> float:
        """The clock, when a GPU has done what it was told."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else peak_rss()

    @torch.no_grad()
    def _fvu(self, reconstruct: Callable[[torch.Tensor], torch.Tensor]) -> float:
        error_BD = reconstruct(self._probe_BD) - self._probe_BD
        centred_BD = self._probe_BD - self._probe_BD.mean(0)
        return float(error_BD.square().sum() / centred_BD.square().sum())


def traffic_of(optimizers: Sequence[torch.optim.Optimizer]) -> float:
    """`Turn.traffic` where every weight is visited: gradients are read, weights and state are read and written."""
    moved = 0
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for weight in group["params"]:
                state = [each for each in optimizer.state[weight].values() if isinstance(each, torch.Tensor)]
                moved += 3 * weight.nbytes + 2 * sum(each.nbytes for each in state)
    return float(moved)


def peak_rss() -> int:
    """Largest resident memory of this process, in bytes.

    Linux's own counter where there is one: `ru_maxrss` of a child starts from that of its parent.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
