"""A whole training run of one contender, and its judgement; what `trainings.py` and its workers say to each other.

A worker is a script beside this file, run by the interpreter of the environment that holds its library. Its one
argument is a `Task` as JSON. It trains on exactly the task's batches, in their order, and writes a `Judgement` as JSON.

Standalone: torch and numpy only, so that it runs in both environments.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

# Rows of the start of the stream that a run may look at before it trains.
SAMPLE_ROWS = 65_536
# Rows of the end of the stream on which a feature may show that it lives, besides the held-out ones.
CENSUS_ROWS = 500_000
JUDGED_AT_ONCE = 2048
# A rise of the learning rate that is given in steps is meant for long runs. Here it is no longer than this part of one.
LONGEST_RISE = 10

# From rows (B, D) to their reconstructions (B, D) and which features fired on any of them (F).
Judge = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
# From rows (B, D) to the values that fire and their features, (B, K) each; what is 0 does not fire. K may differ.
Encode = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclasses.dataclass(frozen=True)
class Task:
    """One run.

    `rate` multiplies the learning rate that the library would choose. `data` and `heldout` are .npy files of rows of
    bfloat16, as int16 of the same bits: `data` has steps x batch of them. `directions` is a .npy file of the true
    features, where there are any. Where `code` is given, the decoder and what the dictionary makes of the held-out rows
    go there, as .npz of W_dec (F, D), z (N, K) and indices (N, K). `settings` are fields of the manifest's `train`, and
    `start` multiplies the encoder that training starts from; both are for Kilobasis alone.
    """

    width: int
    features: int
    k: int
    batch: int
    steps: int
    threads: int
    seed: int
    variant: str
    rate: float
    data: str
    heldout: str
    result: str
    directions: str | None = None
    code: str | None = None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    start: float = 1.0
    device: str = "cpu"


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What came of a run.

    `fvu`: sum of squared errors over sum of squared deviations from the mean, over all held-out rows, unscaled.
    `dead`: share of features that fire neither on a held-out row nor on the last rows of training.
    `found`: mean over true features of their largest cosine similarity to a decoder row that fires; `true`: mean over
    those decoder rows of their largest one to a true feature.
    """

    fvu: float
    dead: float
    seconds: float
    found: float | None = None
    true: float | None = None


class Course:
    """A worker's side. Made before anything else, because it sets threads and the seed."""

    def __init__(self) -> None:
        self.task = Task(**json.loads(sys.argv[1]))
        torch.set_num_threads(self.task.threads)
        torch.manual_seed(self.task.seed)
        self.device = torch.device(self.task.device)
        self._data_ND = np.load(self.task.data, mmap_mode="r")
        self._began = time.perf_counter()

    def sample(self) -> torch.Tensor:
        """Rows to start from; those that are trained on first. Shape (N, D)."""
        return decoded(self._data_ND[:SAMPLE_ROWS], self.device)

    def batches(self) -> Iterator[torch.Tensor]:
        """All batches, from the first one on. Shape of each (B, D)."""
        for first in range(0, self.task.steps * self.task.batch, self.task.batch):
            yield decoded(self._data_ND[first : first + self.task.batch], self.device)

    def rise(self, own: int) -> int:
        """Steps of a rise of the rate for which the library would take `own`."""
        return min(own, self.task.steps // LONGEST_RISE)

    def finish(self, judge: Judge, W_dec_FD: torch.Tensor, encode: Encode | None = None) -> None:
        """Judge what was trained, and write it down.

        Args:
            judge: See `Judge`; of raw rows.
            W_dec_FD: The decoder's rows, of any length.
            encode: See `Encode`; of raw rows. Asked where the task wants the code.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._began
        with torch.no_grad():
            fvu, fired_F = self._fvu(judge)
            found, true = None, None
            if self.task.directions is not None:
                found, true = recovery(torch.from_numpy(np.load(self.task.directions)), W_dec_FD.cpu()[fired_F])
            if self.task.code is not None:
                assert encode is not None, "nobody says what fires"
                self._keep_code(Path(self.task.code), encode, W_dec_FD)
        dead = 1.0 - float(fired_F.double().mean())
        judgement = Judgement(fvu, dead, seconds, found, true)
        Path(self.task.result).write_text(json.dumps(dataclasses.asdict(judgement)))

    def _keep_code(self, path: Path, encode: Encode, W_dec_FD: torch.Tensor) -> None:
        pairs = (encode(x_BD) for x_BD in pieces(np.load(self.task.heldout, mmap_mode="r"), self.device))
        made = [(z_BK.cpu(), indices_BK.cpu()) for z_BK, indices_BK in pairs]
        most = max(z_BK.shape[1] for z_BK, _ in made)
        z_NK, indices_NK = (
            torch.cat([torch.nn.functional.pad(each_BK, (0, most - each_BK.shape[1])) for each_BK in parts])
            for parts in zip(*made, strict=True)
        )
        np.savez(path, W_dec=W_dec_FD.float().cpu().numpy(), z=z_NK.float().numpy(), indices=indices_NK.int().numpy())

    def _fvu(self, judge: Judge) -> tuple[float, torch.Tensor]:
        heldout_ND = np.load(self.task.heldout, mmap_mode="r")
        fired_F = torch.zeros(self.task.features, dtype=torch.bool)
        error, square, sum_D = 0.0, 0.0, torch.zeros(self.task.width, dtype=torch.float64)
        for x_BD in pieces(heldout_ND, self.device):
            x_hat_BD, now_F = judge(x_BD)
            fired_F |= now_F.cpu()
            error += float((x_hat_BD.double() - x_BD.double()).square().sum())
            square += float(x_BD.double().square().sum())
            sum_D += x_BD.double().sum(0).cpu()
        for x_BD in pieces(self._data_ND[-CENSUS_ROWS:], self.device):
            fired_F |= judge(x_BD)[1].cpu()
        return error / (square - float(sum_D.square().sum()) / len(heldout_ND)), fired_F


def largest(code_BF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What fires of a dense code, see `Encode`."""
    z_BK, indices_BK = code_BF.topk(max(1, int((code_BF > 0).sum(1).max())), dim=1)
    return z_BK.clamp_min(0), indices_BK


def decoded(rows_ND: np.ndarray[Any, np.dtype[np.int16]], device: torch.device) -> torch.Tensor:
    """Rows as float32."""
    return torch.from_numpy(np.array(rows_ND)).to(device).view(torch.bfloat16).float()


def pieces(rows_ND: np.ndarray[Any, np.dtype[np.int16]], device: torch.device) -> Iterator[torch.Tensor]:
    """Rows as float32, a few at a time."""
    for first in range(0, len(rows_ND), JUDGED_AT_ONCE):
        yield decoded(rows_ND[first : first + JUDGED_AT_ONCE], device)


def recovery(true_MD: torch.Tensor, learned_FD: torch.Tensor) -> tuple[float, float]:
    """See `Judgement`: found, true. Signs count, because features are never negative."""
    if not len(learned_FD):
        return 0.0, 0.0
    true_MD, learned_FD = (torch.nn.functional.normalize(each.float(), dim=1) for each in (true_MD, learned_FD))
    best_M = torch.cat([(part @ learned_FD.T).amax(1) for part in torch.split(true_MD, JUDGED_AT_ONCE)])
    best_F = torch.cat([(part @ true_MD.T).amax(1) for part in torch.split(learned_FD, JUDGED_AT_ONCE)])
    return float(best_M.double().mean()), float(best_F.double().mean())
