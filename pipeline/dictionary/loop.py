"""The training loop of dictionaries of the same activations on one rank, top to bottom.

Construction follows execution: data, dictionary, optimizer, engine, checkpoint, loop. Activations are
scaled so that their variance sums to d; the scale is folded back before a dictionary is saved, so that
what is saved takes raw activations.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, NoReturn, Self

import torch

from cluster.storage.parsing import parsing
from pipeline.activations.read import Cursor, Stream
from pipeline.dictionary import checkpoint, parallel
from pipeline.dictionary.checkpoint import Progress, Saver
from pipeline.dictionary.kernels.native_library import library
from pipeline.dictionary.model import DictionaryConfig, TopKDictionary
from pipeline.dictionary.pace import Pace
from pipeline.dictionary.parallel import Dense
from pipeline.dictionary.ranks import Ranks
from pipeline.dictionary.stored import empty
from pipeline.dictionary.topk import has_triton
from pipeline.dictionary.trainer import StepScalars, Trainer
from pipeline.stage import Checkpoints, Gang
from schemas import events
from schemas.errors import LeftError, NonFiniteError
from schemas.records import CheckpointRecord
from schemas.training import Train

CURVE_POINTS = 400
EVENT_SECONDS = 1.0
# So often training says how it is, between the points of its curves as well.
TELL_SECONDS = 10.0
# What rank 0 decides behind a step, for all of them; it may decide both.
LEAVE, TELL = 1, 2
NO_KERNELS = {
    "cpu": "no compiled kernels: torch alone takes several times as long -> install g++, then kilobasis again",
    "cuda": "no triton: torch alone takes several times as long -> pip install triton",
}


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
    """A dictionary that is to be trained: its label for events, its shape, how, and where its checkpoints are.

    `dense` is how DeepSpeed works on what a dense optimizer needs, `coarse_weight` that of a tree's parents' own loss,
    and `rebalance` the tokens between two exchanges of its parents and children.
    """

    stage: str
    shape: DictionaryConfig
    settings: Train
    checkpoints: Checkpoints
    dense: Dense = field(default_factory=Dense)
    coarse_weight: float = 0.0
    rebalance: int | None = None


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

    Raises:
        LeftError: the gang was asked to leave. All that was trained is in checkpoints.
    """
    gang.beat(0, "meeting")
    with parallel.joined(gang.rank, gang.world_size, features, gang.init_method) as ranks:
        return _train(wanted, stream, checkpoint_seconds, ranks, gang, done)


def _train(
    wanted: Sequence[Wanted],
    stream: Stream,
    checkpoint_seconds: float,
    ranks: Ranks,
    gang: Gang,
    done: Callable[[int, Trained], None],
) -> dict[int, NonFiniteError]:
    """A function of its own: what it knows of the gang is gone when the gang is left."""
    failed: dict[int, NonFiniteError] = {}
    with ExitStack() as stack:
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
                batch_BD, cursor = next(batches)
                share = len(batch_BD) // ranks.data
                mine_BD = batch_BD[ranks.data_rank * share :][:share].to(parallel.device(ranks.rank))
                # With the copy to a GPU, in the store's type.
                waited = time.monotonic() - began
                # Once for all. Scales are applied in float32: in the store's type they would round.
                x_BD, y_BD = sides(mine_BD.to(torch.float32), wanted[0].shape)
                for index, each in list(going.items()):
                    if each.progress.step > step:
                        continue
                    try:
                        each.step(x_BD, y_BD, cursor, waited, stream.ready)
                    except NonFiniteError as error:
                        # The frames of its traceback know of the gang.
                        failed[index] = error.with_traceback(None)
                        going.pop(index).close()
                        if len(wanted) > 1 and gang.rank == 0:
                            gang.emit(events.Note(each.wanted.stage, f"{error.what}; other dictionaries go on"))
                        continue
                    if each.is_over:
                        end(index)
                step += 1
                if going:
                    # Who is further waits, and has nothing to say.
                    late = any(each.is_late for each in going.values() if each.progress.step == step)
                    said = int(ranks.first(float(LEAVE * gang.leaving() + TELL * late)))
                    if said & LEAVE:
                        _leave(going.values(), step)
                    for each in going.values():
                        each.asked = bool(said & TELL)
    return failed


def _leave(going: Iterable[Training], step: int) -> NoReturn:
    """Save what was trained up to here. Who is further waits at a checkpoint of his own."""
    for each in going:
        if each.progress.step == step:
            each.save()
    raise LeftError(f"saved at step {step}, to leave", "resume")


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
        since_fired_F, where = None, f"{wanted.stage}: slot {last.slot if last else 0} of the log"
        if state is not None:
            # Weights come before the engine, which may shard them; moments behind it.
            with parsing(where, "checkpoint"):
                since_fired_F, self._curves = checkpoint.restore(state, dictionary)
        self._trainer = Trainer(
            dictionary, settings, self._steps, ranks, wanted.dense, wanted.coarse_weight, wanted.rebalance
        )
        device = self._trainer.engine.device
        if gang.rank == 0 and (note := _without_kernels(device)):
            gang.emit(events.Note(wanted.stage, note))
        if state is not None and since_fired_F is not None:
            with parsing(where, "checkpoint"):
                checkpoint.remind(state, self._trainer.optimizer)
            self._trainer.since_fired_F = since_fired_F.to(device)
            if self._trainer.balance is not None:
                self._trainer.balance.load(state[checkpoint.FIRES])
        self._told = time.monotonic()
        # Whether to say how it is behind the next step, whatever the curves want.
        self.asked = False
        self._pace = Pace(shape, device, ranks.world_size, self.progress.tokens)
        self._saver = Saver(wanted.checkpoints, ranks, checkpoint_seconds, self._committed)

    @property
    def is_over(self) -> bool:
        """Whether all steps are done."""
        return self.progress.step >= self._steps

    @property
    def is_late(self) -> bool:
        """Whether nothing was said for long. Each rank has its own clock: let one decide."""
        return time.monotonic() - self._told >= TELL_SECONDS

    def step(self, x_BD: torch.Tensor, y_BD: torch.Tensor | None, cursor: Cursor, waited: float, ready: int) -> None:
        """Train on a batch, and save what there is when it is time.

        Args:
            x_BD: This rank's share of it, raw, in float32, where the rank computes.
            y_BD: The same of what a transcoder explains.
            cursor: Where the stream is behind it.
            waited: Seconds that it was waited for.
            ready: Batches that could follow at once.

        Raises:
            NonFiniteError: see `Trainer.step`.
        """
        gang, trainer, settings, index = self._gang, self._trainer, self.wanted.settings, self.progress.step
        self._pace.wait(waited, ready)
        gang.beat(index, "step")
        target_BD = None if y_BD is None else y_BD * self.progress.target_scale
        scalars = trainer.step(index, x_BD * self.progress.scale, target_BD)
        if trainer.skipped and gang.rank == 0:
            gang.emit(events.Note(self.wanted.stage, f"DeepSpeed skipped step {index}, {trainer.skipped} in a row"))
        if trainer.risen and gang.rank == 0:
            gang.emit(events.Note(self.wanted.stage, f"step {index}: {_risen(trainer.risen)}"))
        tokens = self.progress.tokens + settings.batch
        self.progress = replace(self.progress, step=index + 1, tokens=tokens, cursor=cursor)
        is_point = index % max(1, self._steps // CURVE_POINTS) == 0 or self.is_over
        if is_point or self.asked:
            self._tell(scalars(), is_point)
        if self.is_over:
            gang.beat(self.progress.step, "saving")
        self._saver.turn(self.progress, lambda: trainer.snapshot(self._curves), last=self.is_over)

    def save(self) -> None:
        """Commit a checkpoint of where training is.

        Raises:
            KilobasisError: it could not be written.
        """
        self._gang.beat(self.progress.step, "saving")
        self._saver.leave(self.progress, lambda: self._trainer.snapshot(self._curves))

    def finish(self) -> Trained | None:
        """Give everything back; what came of it, on rank 0."""
        self._gang.beat(self.progress.step, "saving")
        since_fired_F, dictionary = self._trainer.since_fired_F.cpu(), self._trainer.dictionary
        is_part = self._ranks.features > 1 or self._trainer.engine.shards
        self.close()
        if self._gang.rank != 0:
            return None
        if is_part:
            last = self.wanted.checkpoints.latest()
            assert last is not None
            _, state = self._read(last, 0, self.wanted.shape.features, moments=False)
            dictionary = self._empty(self.wanted.shape.features)
            since_fired_F, _ = checkpoint.restore(state, dictionary)
        dictionary.cpu().rescale(self.progress.scale, self.progress.target_scale)
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
        shape, settings = self.wanted.shape, self.wanted.settings
        # DeepSpeed makes its own bfloat16 of a dense optimizer's weights.
        low = settings.weights == "bfloat16" and settings.optimizer == "row_adam"
        return empty(shape, features, settings.sparsity, torch.bfloat16 if low else torch.float32)

    def _begin(self, dictionary: TopKDictionary, sample_ND: torch.Tensor) -> None:
        x_ND, y_ND = sides(sample_ND, self.wanted.shape)
        scale = scale_of(x_ND)
        target_scale = scale if y_ND is None else scale_of(y_ND)
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

    def _committed(self, step: int, seconds: float) -> None:
        self._gang.emit(events.CheckpointCommitted(self.wanted.stage, step, seconds))

    def _tell(self, now: StepScalars, is_point: bool) -> None:
        """Note a point of the curves, if it is one, and say it now and then."""
        progress = self.progress
        if is_point:
            self._curves.append([progress.step, progress.tokens, *_values(now)])
        if self._gang.rank == 0 and (time.monotonic() - self._told >= EVENT_SECONDS or self.is_over):
            self._told = time.monotonic()
            named = {name: getattr(now, name) for name in StepScalars.__slots__}
            named |= self._pace.scalars(progress.step, progress.tokens)
            whole = self._steps * self.wanted.settings.batch
            self._gang.emit(events.Progress(self.wanted.stage, progress.step, progress.tokens, whole, named))


def _without_kernels(device: torch.device) -> str | None:
    """What to tell a person whose training is slower than it could be."""
    there = library() is not None if device.type == "cpu" else has_triton()
    return None if there else NO_KERNELS[device.type]


def _risen(count: int) -> str:
    if count == 1:
        return "a child became a parent, in the place of one that hardly fired"
    return f"{count} children became parents, in the places of some that hardly fired"


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
