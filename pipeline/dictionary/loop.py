"""The training loop of dictionaries of the same activations on one rank, top to bottom.

Construction follows execution: data, dictionary, optimizer, engine, checkpoint, loop. Activations are
scaled so that their variance sums to d; the scale is folded back before a dictionary is saved, so that
what is saved takes raw activations.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

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
from pipeline.dictionary.parallel import Engine
from pipeline.dictionary.ranks import Ranks
from pipeline.dictionary.resampling import resample
from pipeline.dictionary.topk import has_triton
from pipeline.stage import Checkpoints, Gang
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
NO_KERNELS = {
    "cpu": "no compiled kernels: torch alone takes several times as long -> install g++, then kilobasis again",
    "cuda": "no triton: torch alone takes several times as long -> pip install triton",
}


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
    """

    def __init__(self, dictionary: TopKDictionary, settings: Train, steps: int, ranks: Ranks) -> None:
        self.dictionary, self.settings, self.steps, self.ranks = dictionary, settings, steps, ranks
        self.features = dictionary.features * ranks.features
        self._peak = peak_rate(settings, self.features)
        aux_k = settings.auxiliary(dictionary.width)
        dictionary.to(parallel.device(ranks.rank))
        self.optimizer: RowAdam | SphereAdam
        if settings.optimizer == "row_adam":
            rows = RowObjective(dictionary, aux_k, settings.aux_weight, ranks, settings.prefixes)
            self._rows: RowObjective | None = rows
            row_wise = settings.second_moment == "row"
            # It clips by itself, because the engine sees no gradient but that of b_dec.
            self.optimizer = RowAdam(rows, self._peak, settings.beta2, settings.clip, row_wise, settings.seed)
            self.engine = Engine(rows, self.optimizer, settings.batch, 0.0, ranks)
        else:
            dense, self._rows = DenseObjective(dictionary, aux_k, settings.aux_weight), None
            self.optimizer = SphereAdam(
                dictionary, self._peak, (0.9 if settings.beta1 is None else settings.beta1, settings.beta2)
            )
            self.engine = Engine(dense, self.optimizer, settings.batch, settings.clip, ranks)
        self.since_fired_F = torch.zeros(dictionary.features, dtype=torch.int64, device=self.engine.device)
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
        made: Made = self.engine(x_BD, dead_F if int(dead) else None, *([] if y_BD is None else [y_BD]))
        self.engine.backward(made.total)
        rows = self.optimizer if isinstance(self.optimizer, RowAdam) else None
        norm = self.engine.gradient_norm() if rows is None else rows.norm_bound()
        finite = bool(torch.isfinite(made.total)) and norm < float("inf")
        # Decided together: whoever left alone would leave the others in a collective.
        if not self.ranks.least(float(finite)):
            where = ", not finite on another rank" if finite else ""
            raise NonFiniteError(
                f"train: loss {made.total.item()}, gradient norm {norm} in step {index}{where}",
                "lower train.learning_rate; the last good checkpoint is kept",
            )
        unexplained = self._unexplained(index, bool(int(dead)))
        self.skipped = 0 if self.ranks.least(float(self.engine.step())) else self.skipped + 1
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
        self.optimizer.zero_grad(set_to_none=True)
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
class Wanted:
    """A dictionary that is to be trained: its label for events, its shape, how, and where its checkpoints are."""

    stage: str
    shape: DictionaryConfig
    settings: Train
    checkpoints: Checkpoints


@dataclass(frozen=True, slots=True)
class Trained:
    """What training ends with: the dictionary of raw activations, tokens since each feature fired, and the curves.

    Curves are rows of `schemas.tables.CURVES`; `progress` is where training ended, by a committed checkpoint.
    """

    dictionary: TopKDictionary
    since_fired_F: torch.Tensor
    curves: list[list[float]]
    progress: Progress


def train(
    wanted: Sequence[Wanted],
    stream: Stream,
    checkpoint_seconds: float,
    features: int,
    gang: Gang,
    done: Callable[[int, Trained], None],
) -> dict[int, NonFiniteError]:
    """Train dictionaries of the same activations to their ends, each from its last checkpoint if there is one.

    All of them see each batch that is read, so the store is read once, and each trains the same bits as it would alone.
    Those that are further than others wait until the stream comes to where they are.

    Args:
        wanted: Dictionaries whose settings have the same seed, batch and filter.
        stream: The shuffled activations.
        checkpoint_seconds: Time between checkpoints.
        features: Ranks that share the features.
        gang: This rank's place.
        done: Told, on rank 0, which one has come to its end, and with what.

    Returns:
        Which ones have failed, on every rank. Their last good checkpoints are kept, and the others were trained.
    """
    gang.beat(0, "meeting")
    failed: dict[int, NonFiniteError] = {}
    with parallel.joined(gang.rank, gang.world_size, features, gang.init_method) as ranks, ExitStack() as stack:
        gang.beat(0, "data")
        fresh = any(each.checkpoints.latest() is None for each in wanted)
        sample_ND = stream.sample() if fresh else None
        going = {
            index: stack.enter_context(Training(each, sample_ND, checkpoint_seconds, ranks, gang))
            for index, each in enumerate(wanted)
        }
        del sample_ND

        def end(index: int) -> None:
            trained = going.pop(index).finish()
            if trained is not None:
                done(index, trained)

        for index in [index for index, each in going.items() if each.is_over]:
            end(index)
        if not going:
            return failed
        behind = min(going.values(), key=lambda each: each.progress.step)
        step = behind.progress.step
        with closing(stream.batches(behind.progress.cursor)) as batches:
            while going:
                gang.beat(step, "data")
                began = time.monotonic()
                x_BD, cursor = next(batches)
                waited = time.monotonic() - began
                for index, each in list(going.items()):
                    if each.progress.step > step:
                        continue
                    try:
                        each.step(x_BD, cursor, waited)
                    except NonFiniteError as error:
                        failed[index] = error
                        going.pop(index).close()
                        if len(wanted) > 1 and gang.rank == 0:
                            gang.emit(events.Note(each.wanted.stage, f"{error.what}; other dictionaries go on"))
                        continue
                    if each.is_over:
                        end(index)
                step += 1
    return failed


class Training:
    """One dictionary on its way from its beginning, or its last checkpoint, to its end. A context manager.

    Args:
        wanted: Which.
        sample_ND: Rows of the stream, where training begins.
        checkpoint_seconds: Time between checkpoints.
        ranks: This rank's place.
        gang: Whom to tell.
    """

    def __init__(
        self, wanted: Wanted, sample_ND: torch.Tensor | None, checkpoint_seconds: float, ranks: Ranks, gang: Gang
    ) -> None:
        self.wanted, self._ranks, self._gang = wanted, ranks, gang
        shape, settings = wanted.shape, wanted.settings
        self._steps = -(-settings.tokens // settings.batch)
        self._share = settings.batch // ranks.data
        dictionary = self._empty(shape.features // ranks.features).to(parallel.device(ranks.rank))
        self.progress, self._curves, state = Progress(0, 0, 1.0, Cursor(), 1.0), list[list[float]](), None
        last = wanted.checkpoints.latest()
        checkpoint.require_same(last, ranks, wanted.stage)
        if last is not None:
            first = ranks.feature_rank * dictionary.features
            self.progress, state = self._read(last, first, dictionary.features)
        else:
            assert sample_ND is not None
            self._begin(dictionary, sample_ND)
        gang.beat(self.progress.step, "starting")
        self._trainer = Trainer(dictionary, settings, self._steps, ranks)
        device = self._trainer.engine.device
        if gang.rank == 0 and (note := _without_kernels(device)):
            gang.emit(events.Note(wanted.stage, note))
        if state is not None:
            with parsing(f"{wanted.stage}: slot {last.slot if last else 0} of the log", "checkpoint"):
                since_fired_F, self._curves = checkpoint.restore(state, dictionary, self._trainer.optimizer)
            self._trainer.since_fired_F = since_fired_F.to(device)
        self._told = time.monotonic()
        self._pace = Pace(shape, device, ranks.world_size, self.progress.tokens)
        self._saver = Saver(wanted.checkpoints, ranks, checkpoint_seconds, self._committed)

    @property
    def is_over(self) -> bool:
        """Whether all steps are done."""
        return self.progress.step >= self._steps

    def step(self, x_BD: torch.Tensor, cursor: Cursor, waited: float) -> None:
        """Train on a batch, and save what there is when it is time.

        Args:
            x_BD: The whole batch, in the store's type.
            cursor: Where the stream is behind it.
            waited: Seconds that it was waited for.

        Raises:
            NonFiniteError: see `Trainer.step`.
        """
        gang, trainer, settings, index = self._gang, self._trainer, self.wanted.settings, self.progress.step
        self._pace.wait(waited)
        gang.beat(index, "step")
        mine = x_BD[self._ranks.data_rank * self._share :][: self._share]
        # Scales are applied in float32: in the store's type they would round.
        share_BD, target_BD = sides(mine.to(trainer.engine.device, torch.float32), self.wanted.shape)
        target_BD = None if target_BD is None else target_BD * self.progress.target_scale
        scalars = trainer.step(index, share_BD * self.progress.scale, target_BD)
        if trainer.skipped and gang.rank == 0:
            gang.emit(events.Note(self.wanted.stage, f"DeepSpeed skipped step {index}, {trainer.skipped} in a row"))
        tokens = self.progress.tokens + settings.batch
        self.progress = replace(self.progress, step=index + 1, tokens=tokens, cursor=cursor)
        if index % max(1, self._steps // CURVE_POINTS) == 0 or self.is_over:
            self._tell(scalars())
        if self.is_over:
            gang.beat(self.progress.step, "saving")
        self._saver.turn(self.progress, self._snapshot, last=self.is_over)

    def finish(self) -> Trained | None:
        """Give everything back; what came of it, on rank 0."""
        self._gang.beat(self.progress.step, "saving")
        since_fired_F, dictionary = self._trainer.since_fired_F.cpu(), self._trainer.dictionary.cpu()
        self.close()
        if self._gang.rank != 0:
            return None
        shape = self.wanted.shape
        if dictionary.features < shape.features:
            last = self.wanted.checkpoints.latest()
            assert last is not None
            _, state = self._read(last, 0, shape.features, moments=False)
            dictionary = self._empty(shape.features)
            since_fired_F, _ = checkpoint.restore(state, dictionary, None)
        dictionary.rescale(self.progress.scale, self.progress.target_scale)
        return Trained(dictionary, since_fired_F, self._curves, self.progress)

    def close(self) -> None:
        """Stop; what is not committed by now is left."""
        self._saver.close()
        if hasattr(self, "_trainer"):
            self._trainer.engine.close()
            del self._trainer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _empty(self, features: int) -> TopKDictionary:
        shape = self.wanted.shape
        activation = kind(shape.activation, shape.k, self.wanted.settings.sparsity)
        return TopKDictionary(shape.width, features, activation, target_width=shape.target_width)

    def _begin(self, dictionary: TopKDictionary, sample_ND: torch.Tensor) -> None:
        x_ND, y_ND = sides(sample_ND, self.wanted.shape)
        scale, target_scale = scale_of(x_ND), scale_of(x_ND if y_ND is None else y_ND)
        self.progress = Progress(0, 0, scale, Cursor(), target_scale)
        target_ND = None if y_ND is None else y_ND * target_scale
        dictionary.initialize(x_ND * scale, self.wanted.settings.seed, self._ranks, target_ND)

    def _read(
        self, last: CheckpointRecord, first: int, count: int, moments: bool = True
    ) -> tuple[Progress, dict[str, torch.Tensor]]:
        """Where a checkpoint is, and its state of some features."""
        stage = self.wanted.stage
        with parsing(f"slot {last.slot} of {stage}'s log", "checkpoint"):
            progress = checkpoint.parse_facts(last.facts)
        bodies = (self.wanted.checkpoints.read(entry) for entry in last.objects)
        with parsing(f"{stage}: {last.objects[0].key}", "checkpoint"):
            return progress, checkpoint.read(bodies, first, count, moments)

    def _snapshot(self) -> dict[str, torch.Tensor]:
        trainer = self._trainer
        return checkpoint.state(trainer.dictionary, trainer.optimizer, trainer.since_fired_F, self._curves)

    def _committed(self, step: int, seconds: float) -> None:
        self._gang.emit(events.CheckpointCommitted(self.wanted.stage, step, seconds))

    def _tell(self, now: StepScalars) -> None:
        """Note a point of the curves, and say it now and then."""
        progress = self.progress
        self._curves.append([progress.step, progress.tokens, *_values(now)])
        if self._gang.rank == 0 and (time.monotonic() - self._told >= EVENT_SECONDS or self.is_over):
            self._told = time.monotonic()
            named = {name: getattr(now, name) for name in StepScalars.__slots__}
            named |= self._pace.scalars(progress.step, progress.tokens)
            whole = self._steps * self.wanted.settings.batch
            self._gang.emit(events.Progress(self.wanted.stage, progress.step, progress.tokens, whole, named))


def _without_kernels(device: torch.device) -> str | None:
    """What to tell a person whose training is slower than it could be."""
    there = native.library() is not None if device.type == "cpu" else has_triton()
    return None if there else NO_KERNELS[device.type]


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
