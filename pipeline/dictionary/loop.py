"""The training loop of one dictionary on one rank, top to bottom.

Construction follows execution: data, dictionary, optimizer, engine, checkpoint, loop. Activations are
scaled so that their variance sums to d; the scale is folded back before a dictionary is saved, so that
what is saved takes raw activations.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch

from cluster.storage.parsing import parsing
from pipeline.activations.read import Cursor, Stream
from pipeline.dictionary import checkpoint, parallel
from pipeline.dictionary.activation import kind
from pipeline.dictionary.checkpoint import Progress, Saver
from pipeline.dictionary.kernels import native
from pipeline.dictionary.model import DictionaryConfig, TopKDictionary
from pipeline.dictionary.objective import DenseObjective, Made, RowObjective
from pipeline.dictionary.optimizer import RowAdam, SphereAdam, peak_rate, rate
from pipeline.dictionary.pace import Pace
from pipeline.dictionary.parallel import Dense, Engine
from pipeline.dictionary.passes import accumulated
from pipeline.dictionary.ranks import Ranks
from pipeline.dictionary.resampling import resample
from pipeline.stage import Gang
from schemas import events
from schemas.errors import NonFiniteError
from schemas.records import CheckpointRecord
from schemas.training import Sparsity, Train

CURVE_POINTS = 400
EVENT_SECONDS = 1.0
# Skipped one after the other; more is no overflow that passes, it is a run that looks healthy and learns nothing.
MOST_SKIPPED = 10
# Of one batch's, in the running mean of thresholds that are not learned.
THRESHOLD_WEIGHT = 0.01
NO_KERNELS = "no compiled kernels: torch alone takes several times as long -> install g++, then kilobasis again"


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
        dictionary: This rank's features, with initialized weights, the same on every rank of a data group.
        settings: The manifest's `train`.
        steps: Steps of the whole run, for the schedule.
        ranks: This rank's place.
        dense: How DeepSpeed works on what a dense optimizer needs.
    """

    def __init__(
        self, dictionary: TopKDictionary, settings: Train, steps: int, ranks: Ranks, dense: Dense | None = None
    ) -> None:
        dense = dense or Dense()
        self._accumulate = dense.accumulate
        self.dictionary, self.settings, self.steps, self.ranks = dictionary, settings, steps, ranks
        self.features = dictionary.features * ranks.features
        self._peak = peak_rate(settings, self.features)
        aux_k = settings.auxiliary(dictionary.width)
        dictionary.to(parallel.device(ranks.rank))
        self.since_fired_F = torch.zeros(dictionary.features, dtype=torch.int64, device=dictionary.W_enc.device)
        self.optimizer: RowAdam | SphereAdam
        self._objective: DenseObjective | None = None
        if settings.optimizer == "row_adam":
            rows = RowObjective(dictionary, aux_k, settings.aux_weight, ranks, settings.prefixes)
            self._rows: RowObjective | None = rows
            row_wise = settings.second_moment == "row"
            # It clips by itself, because the engine sees no gradient but that of b_dec.
            self.optimizer = RowAdam(rows, self._peak, settings.beta2, settings.clip, row_wise, settings.seed)
            self.engine = Engine(rows, self.optimizer, settings.batch, 0.0, ranks)
        else:
            self._objective, self._rows = DenseObjective(dictionary, aux_k, settings.aux_weight, ranks), None
            betas = (0.9 if settings.beta1 is None else settings.beta1, settings.beta2)
            self.optimizer = SphereAdam(dictionary, self._peak, betas, ranks)
            if dense.bfloat16:
                # Those that DeepSpeed keeps in float32 are copies of what it has rounded.
                self.optimizer.keep_weights()
            # From here on ZeRO may hold shares of the weights in place of the dictionary's.
            self.engine = Engine(self._objective, self.optimizer, settings.batch, settings.clip, ranks, dense)
        self.skipped = 0

    def step(self, index: int, x_BD: torch.Tensor, y_BD: torch.Tensor | None = None) -> Callable[[], StepScalars]:
        """Train on this rank's share of a batch.

        Args:
            index: The step, from 0; decides the learning rate.
            x_BD: Scaled activations, float32, on the engine's device.
            y_BD: The same of what a transcoder explains.

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
        if self._rows is not None:
            self._rows.sparsity = sparsity_weight(index, self.steps, self.settings)
        dead = self.ranks.total(dead_F.sum(), "scalars")
        made = self._passed(x_BD, dead_F if int(dead) else None, y_BD)
        rows = self.optimizer if isinstance(self.optimizer, RowAdam) else None
        norm = self._norm_bound()
        # Under ZeRO nobody has seen the whole gradient yet: ranks have to agree before they step together.
        whole = self.ranks.mean(made.total.detach().clone()) if self.engine.shards else made.total
        _refuse_unless_finite(whole, norm, index)
        unexplained = self._unexplained(index, bool(int(dead)))
        self.skipped = 0 if self.engine.step() else self.skipped + 1
        if self.engine.shards:
            norm = self.engine.gradient_norm()
            _refuse_unless_finite(whole, norm, index)
        if self.skipped >= MOST_SKIPPED:
            raise NonFiniteError(
                f"train: DeepSpeed skipped {self.skipped} steps in a row, the last one step {index} on rank "
                f"{self.ranks.rank}: gradients overflow",
                "lower train.learning_rate; the last good checkpoint is kept",
            )
        norm = norm if rows is None else rows.gradient_norm
        if self._rows is not None:
            # A mean of all steps at first, later of the last hundred or so.
            self.dictionary.settle(self._rows.least, max(1 / (index + 1), THRESHOLD_WEIGHT))
        self._count(made.z_BK, made.indices_BK)
        if rows is not None and unexplained is not None:
            residual_BD, seen_BD = unexplained
            started = resample(
                rows.rows, dead_F, residual_BD, self.settings.seed, index, self.ranks, None if y_BD is None else seen_BD
            )
            self.since_fired_F[started] = 0

        def scalars() -> StepScalars:
            # Of the whole batch, about its own mean: in float64, however many ranks share it, it is the same number.
            whole_BD = self.ranks.gather(x_BD if y_BD is None else y_BD, "curves").double()
            variance = float((whole_BD - whole_BD.mean(0)).square().mean())
            active = (made.z_BK > 0).double().sum() / len(x_BD)
            losses = [each.detach().double() for each in (made.total, made.main, made.auxiliary)]
            loss, main, auxiliary, l0 = self.ranks.mean(torch.stack([*losses, active])).tolist()
            l0 = float(self.ranks.total(torch.tensor(l0, dtype=torch.float64), "scalars"))
            dead = self.ranks.total((self.since_fired_F > self.settings.dead_after).sum(), "scalars")
            return StepScalars(
                loss=loss,
                fvu=main / max(variance, 1e-12),
                l0=l0,
                dead=int(dead) / self.features,
                aux_loss=auxiliary,
                learning_rate=learning_rate,
                gradient_norm=norm,
            )

        return scalars

    def snapshot(self, curves: list[list[float]]) -> dict[str, torch.Tensor]:
        """A copy of this rank's part of the state, see `checkpoint.state`. Collective."""
        # Under ZeRO the dictionary has what the next pass sees of the weights, if anything; the optimizer moves others.
        weights: Mapping[str, torch.Tensor] = self.dictionary.state_dict()
        if isinstance(self.optimizer, SphereAdam) and self.engine.shards:
            weights = self.optimizer.weights()
        return checkpoint.state(weights, self.optimizer.tensors(), self.since_fired_F, curves, self.ranks)

    def _passed(self, x_BD: torch.Tensor, dead_F: torch.Tensor | None, y_BD: torch.Tensor | None) -> Made:
        """Forward and backward."""
        if self._objective is not None and self._accumulate > 1:
            return accumulated(self.engine, self._objective, x_BD, dead_F, self._accumulate)
        made: Made = self.engine(x_BD, dead_F, *([] if y_BD is None else [y_BD]))
        self.engine.backward(made.total)
        return made

    def _norm_bound(self) -> float:
        """No less than the gradient's norm, as far as that is known before the step. Collective."""
        if isinstance(self.optimizer, RowAdam):
            return self.optimizer.norm_bound()
        return 0.0 if self.engine.shards else self.engine.gradient_norm()

    def _unexplained(self, index: int, dead: bool) -> tuple[torch.Tensor, torch.Tensor] | None:
        """In a step behind which dead features start again: what is left of the whole batch, and what was encoded."""
        every, batch = self.settings.resample, self.settings.batch
        if self._rows is None or every is None or not dead or index >= self.steps * (1 - self.settings.decay):
            return None
        if (index + 1) * batch // every == index * batch // every:
            return None
        pending = self._rows.pending
        assert pending is not None
        return -pending.errors[len(self.settings.prefixes)], pending.x_BD

    def _count(self, z_BK: torch.Tensor, indices_BK: torch.Tensor) -> None:
        """Tokens since each feature fired, over the batches of all ranks."""
        fired_F = torch.zeros(len(self.since_fired_F), dtype=torch.uint8, device=z_BK.device)
        fired_F[indices_BK[z_BK > 0]] = 1
        fired_F = self.ranks.any(fired_F)
        self.since_fired_F += self.settings.batch
        self.since_fired_F[fired_F.bool()] = 0


def _refuse_unless_finite(loss: torch.Tensor, norm: float, index: int) -> None:
    if not (torch.isfinite(loss) and norm < float("inf")):
        raise NonFiniteError(
            f"train: loss {loss.item()}, gradient norm {norm} in step {index}",
            "lower train.learning_rate; the last good checkpoint is kept",
        )


def sparsity_weight(step: int, steps: int, settings: Train) -> float:
    """Weight of the loss that keeps features few: rises from zero, linearly.

    >>> settings = Train(tokens=10, batch=1, sparsity={"weight": 2.0, "warmup": 0.5})
    >>> [sparsity_weight(step, 10, settings) for step in (0, 2, 4, 9)]
    [0.4, 1.2, 2.0, 2.0]
    """
    sparsity = settings.sparsity or Sparsity()
    return sparsity.weight * min(1.0, (step + 1) / max(1.0, sparsity.warmup * steps))


def scale_of(sample_ND: torch.Tensor) -> float:
    """The factor that makes the variance of the activations sum to d."""
    centred_ND = sample_ND.double() - sample_ND.double().mean(0)
    return float(centred_ND.square().mean().clamp_min(1e-30).rsqrt())


def sides(x_BD: torch.Tensor, shape: DictionaryConfig) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows of a stream as what is encoded and, with a transcoder, what is explained. Shapes (B, D), (B, E)."""
    if shape.target_width is None:
        return x_BD, None
    return x_BD[:, : shape.width].contiguous(), x_BD[:, shape.width :].contiguous()


@dataclass(frozen=True, slots=True)
class Trained:
    """What training ends with, the same on every rank but for the dictionary, which is this rank's part of it."""

    dictionary: TopKDictionary
    since_fired_F: torch.Tensor
    curves: list[list[float]]
    progress: Progress


def train(
    stage: str,
    stream: Stream,
    shape: DictionaryConfig,
    settings: Train,
    checkpoint_seconds: float,
    features: int,
    gang: Gang,
    dense: Dense | None = None,
) -> Trained | None:
    """Train to the end, from the last checkpoint if there is one.

    Args:
        stage: Label for events.
        stream: The shuffled activations.
        shape: Width, features and k of the dictionary.
        settings: The manifest's `train`.
        checkpoint_seconds: Time between checkpoints.
        features: Ranks that share the features.
        gang: This rank's place, and where checkpoints go.
        dense: How DeepSpeed works on what a dense optimizer needs.

    Returns:
        On rank 0 the dictionary of raw activations, the tokens since each feature fired, the curves (rows of
        `schemas.tables.CURVES`) and where training ended, from a committed checkpoint. Nothing on the others.
    """
    steps = -(-settings.tokens // settings.batch)
    gang.beat(0, "data")
    with parallel.joined(gang.rank, gang.world_size, features, gang.init_method) as ranks:
        count = shape.features // features
        activation = kind(shape.activation, shape.k, settings.sparsity)
        # DeepSpeed makes its own bfloat16 of a dense optimizer's weights.
        low = settings.weights == "bfloat16" and settings.optimizer == "row_adam"
        rows = torch.bfloat16 if low else torch.float32
        dictionary = TopKDictionary(shape.width, count, activation, rows, shape.target_width)
        last = gang.checkpoints.latest()
        progress, curves = Progress(0, 0, 1.0, Cursor(), 1.0), list[list[float]]()
        state = None
        if last is not None:
            progress, state = _read(stage, last, gang, ranks.feature_rank * count, count)
        else:
            x_ND, y_ND = sides(stream.sample(), shape)
            progress = Progress(0, 0, scale_of(x_ND), Cursor(), scale_of(x_ND if y_ND is None else y_ND))
            target_ND = None if y_ND is None else y_ND * progress.target_scale
            dictionary.initialize(x_ND * progress.scale, settings.seed, ranks, target_ND)
            del x_ND, y_ND, target_ND
        gang.beat(progress.step, "starting")
        since_fired_F = None
        # Weights come before the engine, which may shard them; moments behind it.
        with parsing(f"{stage}: slot {last.slot if last else 0} of the log", "checkpoint"):
            if state is not None:
                since_fired_F, curves = checkpoint.restore(state, dictionary)
        trainer = Trainer(dictionary, settings, steps, ranks, dense)
        if gang.rank == 0 and trainer.engine.device.type == "cpu" and native.library() is None:
            gang.emit(events.Note(stage, NO_KERNELS))
        with trainer.engine:
            if state is not None and since_fired_F is not None:
                with parsing(f"{stage}: slot {last.slot if last else 0} of the log", "checkpoint"):
                    checkpoint.remind(state, trainer.optimizer)
                trainer.since_fired_F = since_fired_F.to(trainer.engine.device)
                del state
            if progress.step < steps:
                progress = _loop(stage, stream, trainer, shape, progress, curves, checkpoint_seconds, gang)
            gang.beat(progress.step, "saving")
            since_fired_F = trainer.since_fired_F.cpu()
        if gang.rank != 0:
            return None
        if features > 1 or trainer.engine.shards:
            last = gang.checkpoints.latest()
            assert last is not None
            _, state = _read(stage, last, gang, 0, shape.features, moments=False)
            dictionary = TopKDictionary(shape.width, shape.features, activation, rows, shape.target_width)
            since_fired_F, _ = checkpoint.restore(state, dictionary)
        dictionary.cpu().rescale(progress.scale, progress.target_scale)
        return Trained(dictionary, since_fired_F, curves, progress)


def _read(
    stage: str, last: CheckpointRecord, gang: Gang, first: int, count: int, moments: bool = True
) -> tuple[Progress, dict[str, torch.Tensor]]:
    """Where a checkpoint is, and its state of some features."""
    with parsing(f"slot {last.slot} of {stage}'s log", "checkpoint"):
        progress = checkpoint.parse_facts(last.facts)
    bodies = (gang.checkpoints.read(entry) for entry in last.objects)
    with parsing(f"{stage}: {last.objects[0].key}", "checkpoint"):
        return progress, checkpoint.read(bodies, first, count, moments)


def _loop(
    stage: str,
    stream: Stream,
    trainer: Trainer,
    shape: DictionaryConfig,
    progress: Progress,
    curves: list[list[float]],
    checkpoint_seconds: float,
    gang: Gang,
) -> Progress:
    settings, steps, ranks = trainer.settings, trainer.steps, trainer.ranks
    share = settings.batch // ranks.data
    mine = slice(ranks.data_rank * share, (ranks.data_rank + 1) * share)
    every = max(1, steps // CURVE_POINTS)
    told = time.monotonic()
    pace = Pace(shape, trainer.engine.device, ranks.world_size, progress.tokens)
    batches = stream.batches(progress.cursor)

    def snapshot() -> dict[str, torch.Tensor]:
        return trainer.snapshot(curves)

    def committed(step: int, seconds: float) -> None:
        gang.emit(events.CheckpointCommitted(stage, step, seconds))

    with closing(batches), Saver(gang.checkpoints, ranks, checkpoint_seconds, committed) as saver:
        for index in range(progress.step, steps):
            gang.beat(index, "data")
            with pace.waiting():
                x_BD, cursor = next(batches)
            gang.beat(index, "step")
            # Scales are applied in float32: in the store's type they would round.
            share_BD, target_BD = sides(x_BD[mine].to(trainer.engine.device, torch.float32), shape)
            target_BD = None if target_BD is None else target_BD * progress.target_scale
            scalars = trainer.step(index, share_BD * progress.scale, target_BD)
            if trainer.skipped and gang.rank == 0:
                gang.emit(events.Note(stage, f"DeepSpeed skipped step {index}, {trainer.skipped} in a row"))
            progress = replace(progress, step=index + 1, tokens=progress.tokens + settings.batch, cursor=cursor)
            if index % every == 0 or index == steps - 1:
                now = scalars()
                curves.append([progress.step, progress.tokens, *_values(now)])
                if gang.rank == 0 and (time.monotonic() - told >= EVENT_SECONDS or index == steps - 1):
                    told = time.monotonic()
                    named = {name: getattr(now, name) for name in StepScalars.__slots__}
                    named |= pace.scalars(progress.step, progress.tokens)
                    whole = steps * settings.batch
                    gang.emit(events.Progress(stage, progress.step, progress.tokens, whole, named))
            if index == steps - 1:
                gang.beat(progress.step, "saving")
            saver.turn(progress, snapshot, last=index == steps - 1)
    return progress


def _values(scalars: StepScalars) -> list[float]:
    return [getattr(scalars, name) for name in StepScalars.__slots__]


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
