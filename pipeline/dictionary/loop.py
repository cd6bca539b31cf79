"""The training loop of one dictionary on one rank, top to bottom.

Construction follows execution: data, dictionary, optimizer, engine, checkpoint, loop. Activations are
scaled so that their variance sums to d; the scale is folded back before a dictionary is saved, so that
what is saved takes raw activations.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from cluster.storage.parsing import parsing
from pipeline.activations.read import Cursor, Stream
from pipeline.dictionary import checkpoint, loss
from pipeline.dictionary.checkpoint import Progress
from pipeline.dictionary.model import TopKDictionary
from pipeline.dictionary.optimizer import SphereAdam, peak_rate, rate
from pipeline.dictionary.parallel import Engine
from pipeline.stage import Gang
from schemas import events
from schemas.errors import NonFiniteError
from schemas.manifest import Train

CURVE_POINTS = 400
EVENT_SECONDS = 1.0
# Skipped one after the other; more is no overflow that passes, it is a run that looks healthy and learns nothing.
MOST_SKIPPED = 10


@dataclass(frozen=True, slots=True)
class StepScalars:
    """What one step measured, over all ranks."""

    loss: float
    fvu: float
    l0: float
    dead: float
    aux_loss: float
    learning_rate: float
    gradient_norm: float


class Trainer:
    """One dictionary, its optimizer and its engine: everything of a step but the data.

    Args:
        dictionary: Initialized weights, the same on every rank.
        settings: The manifest's `train`.
        steps: Steps of the whole run, for the schedule.
        rank: This rank.
        world_size: Ranks.
        init_method: Where ranks meet.
    """

    def __init__(
        self, dictionary: TopKDictionary, settings: Train, steps: int, rank: int, world_size: int, init_method: str
    ) -> None:
        self.dictionary, self.settings, self.steps = dictionary, settings, steps
        self._peak = peak_rate(settings, dictionary.features)
        self.optimizer = SphereAdam(dictionary, self._peak, (settings.beta1, settings.beta2))
        self.engine = Engine(dictionary, self.optimizer, settings.batch, settings.clip, rank, world_size, init_method)
        self.aux_k = dictionary.width // 2 if settings.aux_k is None else settings.aux_k
        self.since_fired_F = torch.zeros(dictionary.features, dtype=torch.int64, device=self.engine.device)
        self.skipped = 0

    def step(self, index: int, x_BD: torch.Tensor) -> Callable[[], StepScalars]:
        """Train on this rank's share of a batch.

        Args:
            index: The step, from 0; decides the learning rate.
            x_BD: Scaled activations, float32, on the engine's device.

        Returns:
            A function that gives the step's scalars. It is collective: call it on every rank or on none.

        Raises:
            NonFiniteError: the loss or the gradient is not finite, or DeepSpeed has skipped too many steps in
                a row (`skipped` counts them); nothing was updated.
        """
        dead_F = self.since_fired_F > self.settings.dead_after
        learning_rate = rate(index, self.steps, self._peak, self.settings.warmup, self.settings.decay)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        has_dead = bool(dead_F.any())
        code = self.engine(x_BD, dead_F if has_dead else None, self.aux_k if has_dead else 0)
        main = loss.reconstruction(x_BD, code.x_hat_BD)
        auxiliary = loss.auxiliary(x_BD, code)
        total = main + self.settings.aux_weight * auxiliary
        self.engine.backward(total)
        norm = self.engine.gradient_norm()
        if not (torch.isfinite(total) and norm < float("inf")):
            raise NonFiniteError(
                f"train: loss {total.item()}, gradient norm {norm} in step {index}",
                "lower train.learning_rate; the last good checkpoint is kept",
            )
        self.skipped = 0 if self.engine.step() else self.skipped + 1
        if self.skipped >= MOST_SKIPPED:
            raise NonFiniteError(
                f"train: DeepSpeed skipped {self.skipped} steps in a row, the last one step {index} on rank "
                f"{self.engine.rank}: gradients overflow",
                "lower train.learning_rate; the last good checkpoint is kept",
            )
        self.optimizer.zero_grad(set_to_none=True)
        self._count(code.z_BK, code.indices_BK)

        def scalars() -> StepScalars:
            x_BD_centred = x_BD - x_BD.mean(0)
            local = torch.stack(
                [
                    main.detach(),
                    auxiliary.detach(),
                    (x_BD - code.x_hat_BD.detach()).square().mean(),
                    x_BD_centred.square().mean(),
                    (code.z_BK > 0).float().sum(1).mean(),
                ]
            )
            loss_, aux, error, variance, l0 = self.engine.mean(local).tolist()
            return StepScalars(
                loss=loss_ + self.settings.aux_weight * aux,
                fvu=error / max(variance, 1e-12),
                l0=l0,
                dead=float((self.since_fired_F > self.settings.dead_after).float().mean()),
                aux_loss=aux,
                learning_rate=learning_rate,
                gradient_norm=norm,
            )

        return scalars

    def _count(self, z_BK: torch.Tensor, indices_BK: torch.Tensor) -> None:
        """Tokens since each feature fired, over the batches of all ranks."""
        fired_F = torch.zeros(len(self.since_fired_F), dtype=torch.uint8, device=z_BK.device)
        fired_F[indices_BK[z_BK > 0]] = 1
        fired_F = self.engine.any(fired_F)
        self.since_fired_F += self.settings.batch
        self.since_fired_F[fired_F.bool()] = 0


def scale_of(sample_ND: torch.Tensor) -> float:
    """The factor that makes the variance of the activations sum to d."""
    centred_ND = sample_ND.double() - sample_ND.double().mean(0)
    return float(centred_ND.square().mean().clamp_min(1e-30).rsqrt())


def train(
    stage: str,
    stream: Stream,
    dictionary: TopKDictionary,
    settings: Train,
    checkpoint_seconds: float,
    gang: Gang,
) -> tuple[TopKDictionary, list[list[float]], Progress, torch.Tensor]:
    """Train to the end, from the last checkpoint if there is one.

    Args:
        stage: Label for events.
        stream: The shuffled activations.
        dictionary: Its shape counts, its weights are set here.
        settings: The manifest's `train`.
        checkpoint_seconds: Time between checkpoints.
        gang: This rank's place, and where checkpoints go.

    Returns:
        The dictionary of raw activations, the curves (rows of `schemas.tables.CURVES`), where training
        ended, and the tokens since each feature fired. The same on every rank, from a committed checkpoint.
    """
    steps = -(-settings.tokens // settings.batch)
    gang.beat(0, "data")
    last = gang.checkpoints.latest()
    progress = Progress(0, 0, 1.0, Cursor())
    body: bytes | None = None
    if last is not None:
        with parsing(f"slot {last.slot} of {stage}'s log", "checkpoint"):
            progress = checkpoint.parse_facts(last.facts)
            entry = last.objects[0]
        body = gang.checkpoints.read(entry)
    else:
        sample_ND = stream.sample()
        progress = Progress(0, 0, scale_of(sample_ND), Cursor())
        dictionary.initialize(sample_ND * progress.scale, settings.seed)
        del sample_ND
    gang.beat(progress.step, "starting")
    trainer = Trainer(dictionary, settings, steps, gang.rank, gang.world_size, gang.init_method)
    with trainer.engine:
        curves: list[list[float]] = []
        if body is not None:
            with parsing(f"{stage}: {entry.key}", "checkpoint"):
                since_fired_F, curves = checkpoint.unpack(body, dictionary, trainer.optimizer)
            trainer.since_fired_F = since_fired_F.to(trainer.engine.device)
            del body
        if progress.step < steps:
            progress = _loop(stage, stream, trainer, progress, curves, checkpoint_seconds, gang)
        gang.beat(progress.step, "saving")
        dictionary.cpu().rescale(progress.scale)
        return dictionary, curves, progress, trainer.since_fired_F.cpu()


def _loop(
    stage: str,
    stream: Stream,
    trainer: Trainer,
    progress: Progress,
    curves: list[list[float]],
    checkpoint_seconds: float,
    gang: Gang,
) -> Progress:
    settings, steps = trainer.settings, trainer.steps
    share = settings.batch // gang.world_size
    mine = slice(gang.rank * share, (gang.rank + 1) * share)
    every = max(1, steps // CURVE_POINTS)
    saved, told, waited, began = time.monotonic(), time.monotonic(), 0.0, progress.tokens
    started = saved
    batches = stream.batches(progress.cursor)
    for index in range(progress.step, steps):
        asked = time.monotonic()
        gang.beat(index, "data")
        x_BD, cursor = next(batches)
        gang.beat(index, "step")
        waited += time.monotonic() - asked
        # The scale is applied in float32: in the store's type it would round.
        scalars = trainer.step(index, x_BD[mine].to(trainer.engine.device, torch.float32) * progress.scale)
        if trainer.skipped and gang.rank == 0:
            gang.emit(events.Note(stage, f"DeepSpeed skipped step {index}, {trainer.skipped} in a row"))
        progress = Progress(index + 1, progress.tokens + settings.batch, progress.scale, cursor)
        if index % every == 0 or index == steps - 1:
            now = scalars()
            curves.append([progress.step, progress.tokens, *_values(now)])
            if gang.rank == 0 and (time.monotonic() - told >= EVENT_SECONDS or index == steps - 1):
                told = time.monotonic()
                rates = {
                    "tokens_per_second": (progress.tokens - began) / (told - started),
                    "data_wait": waited / (told - started),
                }
                named = {name: getattr(now, name) for name in StepScalars.__slots__}
                gang.emit(events.Progress(stage, progress.step, progress.tokens, steps * settings.batch, named | rates))
        due = time.monotonic() - saved >= checkpoint_seconds or index == steps - 1
        if gang.rank == 0 and due:
            saved = _save(stage, trainer, progress, curves, gang)
    batches.close()  # type: ignore[attr-defined]
    return progress


def _values(scalars: StepScalars) -> list[float]:
    return [getattr(scalars, name) for name in StepScalars.__slots__]


def _save(stage: str, trainer: Trainer, progress: Progress, curves: list[list[float]], gang: Gang) -> float:
    began = time.monotonic()
    gang.beat(progress.step, "saving")
    body = checkpoint.pack(trainer.dictionary, trainer.optimizer, trainer.since_fired_F, curves)
    gang.checkpoints.commit(progress.step, {checkpoint.STATE: body}, checkpoint.facts(progress))
    ended = time.monotonic()
    gang.emit(events.CheckpointCommitted(stage, progress.step, ended - began))
    return ended


def describe(dictionary: TopKDictionary, since_fired_F: torch.Tensor, settings: Train) -> dict[str, Any]:
    """Facts that later stages use."""
    window = min(settings.dead_after, settings.tokens)
    return {
        "features": dictionary.features,
        "width": dictionary.width,
        "k": dictionary.k,
        "dead_window_tokens": window,
        "dead": int((since_fired_F >= window).sum()) / dictionary.features,
    }
