"""What training must remember to go on with the same bits: weights, moments, counters, curves, cursor.

Every rank saves the state of a part of the features, those that hold the same ones as large a part each; the parts are
read back by any number of ranks. A checkpoint is written behind training's back, from a copy of the state; a large
part of it in several files.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch

from pipeline.activations.read import Cursor
from pipeline.dictionary import pieces
from pipeline.dictionary.model import TopKDictionary
from pipeline.dictionary.optimizer import DictionaryOptimizer
from pipeline.dictionary.ranks import Ranks
from pipeline.stage import Checkpoints
from schemas.errors import IntegrityError, OutrunError
from schemas.records import CheckpointRecord, ObjectEntry

STATE = "state"
# Tensors with a row for every feature; dense Adam's are called after their weights.
ROWS = ("model.W_enc", "model.W_dec", "model.b_enc", "adam.encoder_v", "adam.decoder_v", "adam.bias_v", "adam.stamps_F")
FIRST_ROWS = ("adam.encoder_m", "adam.decoder_m", "adam.bias_m")
THRESHOLD_ROWS = ("model.threshold", "adam.threshold_v", "adam.threshold_m")
DENSE_ROWS = ("adam.W_enc.exp", "adam.W_dec.exp", "adam.b_enc.exp")
SINCE_FIRED, FIRES, CURVES = "since_fired", "fires", "curves"


@dataclass(frozen=True, slots=True)
class Progress:
    """The numbers of a checkpoint; `tokens` counts rows.

    `scale` multiplies activations before training, and `target_scale` what a transcoder explains.
    """

    step: int
    tokens: int
    scale: float
    cursor: Cursor
    target_scale: float


def state(
    weights: Mapping[str, torch.Tensor],
    moments: Mapping[str, torch.Tensor],
    counters: Mapping[str, torch.Tensor],
    curves: list[list[float]],
    ranks: Ranks,
) -> dict[str, torch.Tensor]:
    """What this rank writes of the state of its features, copied: as much of them as every rank with the same ones.

    Args:
        weights: Of the dictionary.
        moments: The optimizer's, and its step count.
        counters: Of each feature: tokens since it fired last, and how often it did where that counts.
        curves: Rows of `schemas.tables.CURVES`.
        ranks: This rank's place.
    """
    tensors = {f"model.{name}": value for name, value in weights.items()}
    tensors |= {f"adam.{name}": value for name, value in moments.items()}
    tensors |= {**counters, CURVES: torch.tensor(curves, dtype=torch.float64)}
    features = len(counters[SINCE_FIRED])
    mine = slice(features * ranks.data_rank // ranks.data, features * (ranks.data_rank + 1) // ranks.data)
    return {
        name: (value[mine] if _has_rows(name) else value).detach().to("cpu", copy=True).contiguous()
        for name, value in tensors.items()
    }


def _has_rows(name: str) -> bool:
    return name in (*ROWS, *FIRST_ROWS, *THRESHOLD_ROWS, SINCE_FIRED, FIRES) or name.startswith(DENSE_ROWS)


def read(bodies: Iterable[bytes], first: int, count: int, moments: bool = True) -> dict[str, torch.Tensor]:
    """The state of some features out of the parts of a checkpoint, of which one at a time is in memory.

    Args:
        bodies: The parts, in order.
        first: The first feature wanted.
        count: How many.
        moments: With what belongs to the optimizer.

    Raises:
        IntegrityError: they are not there.
    """
    made, there = pieces.join(bodies, _has_rows, first, count, lambda name: moments or not name.startswith("adam."))
    if first + count > there:
        raise IntegrityError(
            f"the checkpoint has {there} features, expected {first + count}", "delete the train stage's folder"
        )
    return made


def restore(tensors: Mapping[str, torch.Tensor], dictionary: TopKDictionary) -> tuple[torch.Tensor, list[list[float]]]:
    """Put a state back into the dictionary; returns the counters and the curves.

    Raises:
        IntegrityError: the state belongs to another dictionary.
    """
    weights = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    try:
        dictionary.load_state_dict(weights)
    except RuntimeError as error:
        raise IntegrityError(f"the checkpoint does not fit: {error}", "delete the train stage's folder") from error
    return tensors[SINCE_FIRED], tensors[CURVES].tolist()


def remind(tensors: Mapping[str, torch.Tensor], optimizer: DictionaryOptimizer) -> None:
    """Put a state back into the optimizer."""
    optimizer.load({key.removeprefix("adam."): each for key, each in tensors.items() if key.startswith("adam.")})


def facts(progress: Progress) -> dict[str, Any]:
    """The numbers as JSON. The hash exceeds what every JSON reader keeps exactly, so it is text."""
    numbers = asdict(progress)
    numbers["cursor"]["hash"] = f"{progress.cursor.hash:016x}"
    return numbers


def parse_facts(numbers: Mapping[str, Any]) -> Progress:
    """`facts`, read back."""
    cursor = dict(numbers["cursor"])
    cursor["hash"] = int(cursor["hash"], 16)
    return Progress(
        step=int(numbers["step"]),
        tokens=int(numbers["tokens"]),
        scale=float(numbers["scale"]),
        cursor=Cursor(**cursor),
        target_scale=float(numbers["target_scale"]),
    )


def require_same(last: CheckpointRecord | None, ranks: Ranks, stage: str) -> None:
    """Make sure that all ranks begin at the same checkpoint; each has looked by itself.

    Raises:
        OutrunError: they do not. It is raised on every rank.
    """
    found = ranks.texts("" if last is None else last.nonce)
    if len(set(found)) > 1:
        raise OutrunError(
            f"{stage}: ranks found different newest checkpoints: one of an older gang came to light meanwhile",
            "run only one trainer of a stage, and resume",
        )


def _place(entry: ObjectEntry) -> list[str]:
    """Of a file among all of a checkpoint: by part, then by piece, of which the first one has no number."""
    return entry.key.rsplit("/", 1)[-1].removesuffix(".safetensors").split(".")


class Saver:
    """Writes checkpoints in a thread, one at a time. Collective: what is called on one rank is called on all.

    Every rank writes its part of the state; when all have, rank 0 commits them together.

    Args:
        checkpoints: Where to.
        ranks: This rank's place.
        seconds: Time between the beginnings of two.
        committed: Told the step and the seconds that a checkpoint took, on rank 0.
    """

    def __init__(
        self, checkpoints: Checkpoints, ranks: Ranks, seconds: float, committed: Callable[[int, float], None]
    ) -> None:
        self._checkpoints, self._ranks, self._seconds, self._committed = checkpoints, ranks, seconds, committed
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._began = time.monotonic()
        self._progress: Progress | None = None
        self._writing: Future[str] | None = None
        self._committing: Future[Progress] | None = None

    def turn(self, progress: Progress, snapshot: Callable[[], dict[str, torch.Tensor]], last: bool) -> None:
        """Behind every step: go on with a checkpoint that is being written, or begin one when it is time.

        Args:
            progress: Where training is.
            snapshot: Copies this rank's part of the state. Collective.
            last: Training is over: write this state, and wait for it.

        Raises:
            KilobasisError: a checkpoint could not be written.
        """
        self._go_on(wait=last)
        due = last or (self._idle and time.monotonic() - self._began >= self._seconds)
        if self._ranks.first(float(due)) and self._idle:
            self._begin(progress, snapshot)
        if last:
            self._go_on(wait=True)

    def leave(self, progress: Progress, snapshot: Callable[[], dict[str, torch.Tensor]]) -> None:
        """Training is put down here: wait for what is being written, and write this state if that was an older one.

        Args:
            progress: Where training is.
            snapshot: See `turn`.

        Raises:
            KilobasisError: a checkpoint could not be written.
        """
        self._go_on(wait=True)
        if self._progress is None or self._progress.step < progress.step:
            self._begin(progress, snapshot)
            self._go_on(wait=True)

    @property
    def _idle(self) -> bool:
        return self._writing is None and self._committing is None

    def _begin(self, progress: Progress, snapshot: Callable[[], dict[str, torch.Tensor]]) -> None:
        self._began, self._progress = time.monotonic(), progress
        self._writing = self._thread.submit(self._write, progress.step, snapshot())

    def _write(self, step: int, tensors: dict[str, torch.Tensor]) -> str:
        ranks = self._ranks
        # In the order of features.
        part = ranks.feature_rank * ranks.data + ranks.data_rank
        stem = STATE if ranks.world_size == 1 else f"{STATE}-{part:05d}-of-{ranks.world_size:05d}"
        entries = []
        for piece in pieces.cut(tensors, _has_rows):
            name = f"{stem}.{piece.index:05d}.safetensors" if piece.index else f"{stem}.safetensors"
            entries.append(self._checkpoints.write(step, name, piece.body).model_dump_json())
        return "\n".join(entries)

    def _commit(self, progress: Progress, entries: list[ObjectEntry]) -> Progress:
        self._checkpoints.commit(progress.step, entries, facts(progress))
        return progress

    def _go_on(self, wait: bool) -> None:
        if self._writing is not None:
            done = wait or self._writing.done()
            said = self._writing.result() if done else ""
            if self._ranks.least(float(done)):
                # In the order of ranks, which is not that of features.
                written = [line for text in self._ranks.texts(said) for line in text.splitlines()]
                entries = sorted(map(ObjectEntry.model_validate_json, written), key=_place)
                self._writing = None
                if self._ranks.rank == 0:
                    assert self._progress is not None
                    self._committing = self._thread.submit(self._commit, self._progress, entries)
        if self._committing is not None and (wait or self._committing.done()):
            self._committed(self._committing.result().step, time.monotonic() - self._began)
            self._committing = None

    def close(self) -> None:
        """Wait for what is being written. What is not committed is left; nobody refers to it."""
        self._thread.shutdown(wait=True, cancel_futures=True)
