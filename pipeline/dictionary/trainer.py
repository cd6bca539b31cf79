"""One step of training a dictionary on one rank: its objective, its optimizer, its engine, and what it measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from pipeline.dictionary import checkpoint, parallel
from pipeline.dictionary.accumulation import accumulated
from pipeline.dictionary.balance import Balance
from pipeline.dictionary.kernels.portable import Rows
from pipeline.dictionary.model import TopKDictionary
from pipeline.dictionary.objective import DenseObjective, Made, RowObjective, SparseObjective
from pipeline.dictionary.optimizer import RowAdam, SphereAdam, peak_rate, rate
from pipeline.dictionary.parallel import Dense, Engine
from pipeline.dictionary.ranks import Ranks
from pipeline.dictionary.regrowth import regrow
from pipeline.dictionary.resampling import resample
from pipeline.dictionary.topk import kernels
from pipeline.dictionary.tree import TreeDictionary
from pipeline.dictionary.tree_objective import TreeObjective
from schemas.errors import NonFiniteError
from schemas.training import Sparsity, Train

# Skipped one after the other; more is no overflow that passes, it is a run that looks healthy and learns nothing.
MOST_SKIPPED = 10
# Of one batch's, in the running mean of thresholds that are not learned.
THRESHOLD_WEIGHT = 0.01


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
        coarse_weight: Of a tree's parents' own loss.
        rebalance: Tokens between two exchanges of a tree's parents and children; None for never.
    """

    def __init__(
        self,
        dictionary: TopKDictionary,
        settings: Train,
        steps: int,
        ranks: Ranks,
        dense: Dense | None = None,
        coarse_weight: float = 0.0,
        rebalance: int | None = None,
    ) -> None:
        dense = dense or Dense()
        self._accumulate = dense.accumulate
        self.dictionary, self.settings, self.steps, self.ranks = dictionary, settings, steps, ranks
        self.features = dictionary.features * ranks.features
        subtree = dictionary.tree.size if isinstance(dictionary, TreeDictionary) else 1
        self._peak = peak_rate(settings, dictionary.width, self.features, dictionary.k, subtree)
        self._aux_k = aux_k = settings.auxiliary(dictionary.width)
        dictionary.to(parallel.device(ranks.rank))
        self.since_fired_F = torch.zeros(dictionary.features, dtype=torch.int64, device=dictionary.W_enc.device)
        # Tokens that go by before a feature can be dead; below zero where that is not known.
        self._spared = -1
        self.optimizer: RowAdam | SphereAdam
        self._objective: DenseObjective | None = None
        self.balance: Balance | None = None
        if settings.optimizer == "row_adam":
            rows: SparseObjective
            if isinstance(dictionary, TreeDictionary):
                rows = TreeObjective(dictionary, coarse_weight, ranks)
            else:
                rows = RowObjective(dictionary, aux_k, settings.aux_weight, ranks, settings.prefixes)
            self._rows: SparseObjective | None = rows
            # It clips by itself, because the engine sees no gradient but that of b_dec.
            self.optimizer = RowAdam(
                rows, self._peak, settings.beta2, settings.clip, settings.row_wise, settings.seed, settings.beta1
            )
            self.engine = Engine(rows, self.optimizer, settings.batch, 0.0, ranks)
            if isinstance(rows, TreeObjective) and rebalance:
                self.balance = Balance(rows, self.optimizer.rows, rebalance, settings.dead_after)
        else:
            self._objective, self._rows = DenseObjective(dictionary, aux_k, settings.aux_weight, ranks), None
            betas = (settings.beta1, settings.beta2)
            self.optimizer = SphereAdam(dictionary, self._peak, betas, ranks)
            if dense.bfloat16:
                # Those that DeepSpeed keeps in float32 are copies of what it has rounded.
                self.optimizer.keep_weights()
            # From here on ZeRO may hold shares of the weights in place of the dictionary's.
            self.engine = Engine(self._objective, self.optimizer, settings.batch, settings.clip, ranks, dense)
        self.skipped = 0
        # In the last step, over all ranks.
        self.risen = 0

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
        is_restart = self._rows is not None and self._is_time(index, self.settings.resample)
        dead_F = self._dead() if self._aux_k or is_restart else None
        learning_rate = rate(index, self.steps, self._peak, self.settings.warmup, self.settings.decay)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        if self._rows is not None:
            self._rows.sparsity = sparsity_weight(index, self.steps, self.settings)
        made = self._passed(x_BD, dead_F, y_BD)
        rows = self.optimizer if isinstance(self.optimizer, RowAdam) else None
        norm, loss = self._norm_bound(made.total)
        self._refuse_unless_finite(loss, norm, index)
        self.skipped = 0 if self.ranks.least(float(self.engine.step())) else self.skipped + 1
        if self.engine.shards:
            # Only now the whole gradient was seen.
            norm = self.engine.gradient_norm()
            self._refuse_unless_finite(loss, norm, index)
        if self.skipped >= MOST_SKIPPED:
            raise NonFiniteError(
                f"train: DeepSpeed skipped {self.skipped} steps in a row, the last one step {index} on rank "
                f"{self.ranks.rank}: gradients overflow",
                "lower train.learning_rate; the last good checkpoint is kept",
            )
        # Nobody waits for it who does not ask.
        square = None if rows is None else rows.gradient_square
        if self._rows is not None:
            # A mean of all steps at first, later of the last hundred or so.
            self.dictionary.settle(self._rows.least, max(1 / (index + 1), THRESHOLD_WEIGHT))
        self._count(made.z_BK, made.indices_BK)
        if rows is not None and dead_F is not None and is_restart:
            self.since_fired_F[self._restart(rows.rows, dead_F, index, y_BD is not None)] = 0
        self.risen = 0
        if self.balance is not None and self._is_time(index, self.balance.every):
            self.risen = self.balance.exchange(made.z_BK, made.indices_BK, self.since_fired_F)
            self._spared = -1
        if self._rows is not None:
            self._rows.forget()

        def scalars() -> StepScalars:
            # Of the whole batch, about its own mean: added up in float64, column by column, it is the same number
            # however many ranks and threads share it.
            whole_BD = self.ranks.gather(x_BD if y_BD is None else y_BD, "curves")
            centred_BD = whole_BD - whole_BD.mean(0, dtype=torch.float64).float()
            variance = float(centred_BD.square_().sum(0, dtype=torch.float64).sum()) / centred_BD.numel()
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
                gradient_norm=norm if square is None else math.sqrt(float(square)),
            )

        return scalars

    def snapshot(self, curves: list[list[float]]) -> dict[str, torch.Tensor]:
        """A copy of this rank's part of the state, see `checkpoint.state`. Collective."""
        # Under ZeRO the dictionary has what the next pass sees of the weights, if anything; the optimizer moves others.
        weights: Mapping[str, torch.Tensor] = self.dictionary.state_dict()
        if isinstance(self.optimizer, SphereAdam) and self.engine.shards:
            weights = self.optimizer.weights()
        counters = {checkpoint.SINCE_FIRED: self.since_fired_F}
        if self.balance is not None:
            counters[checkpoint.FIRES] = self.balance.fires()
        return checkpoint.state(weights, self.optimizer.tensors(), counters, curves, self.ranks)

    def _passed(self, x_BD: torch.Tensor, dead_F: torch.Tensor | None, y_BD: torch.Tensor | None) -> Made:
        """Forward and backward."""
        if self._objective is not None and self._accumulate > 1:
            return accumulated(self.engine, self._objective, x_BD, dead_F, self._accumulate)
        made: Made = self.engine(x_BD, dead_F, *([] if y_BD is None else [y_BD]))
        self.engine.backward(made.total)
        return made

    def _dead(self) -> torch.Tensor | None:
        """Which of this rank's features are dead, shape (F,); None where none is on any. Collective.

        Looked at only when a feature can have died since the last time: on a GPU, to look is to wait.
        """
        if self._spared >= 0:
            return None
        longest = int(self.since_fired_F.max())
        self._spared = self.settings.dead_after + int(self.ranks.least(-float(longest)))
        return None if self._spared >= 0 else self.since_fired_F > self.settings.dead_after

    def _norm_bound(self, loss: torch.Tensor) -> tuple[float, float]:
        """No less than the gradient's norm, as far as that is known before the step; and the loss. Collective."""
        if isinstance(self.optimizer, RowAdam):
            return self.optimizer.norm_bound(loss)
        return 0.0 if self.engine.shards else self.engine.gradient_norm(), float(loss.detach())

    def _refuse_unless_finite(self, loss: float, norm: float, index: int) -> None:
        """Decided together: whoever left alone would leave the others in a collective."""
        finite = math.isfinite(loss) and norm < float("inf")
        if not self.ranks.least(float(finite)):
            where = ", not finite on another rank" if finite else ""
            raise NonFiniteError(
                f"train: loss {loss}, gradient norm {norm} in step {index}{where}",
                "lower train.learning_rate; the last good checkpoint is kept",
            )

    def _is_time(self, index: int, every: int | None) -> bool:
        """Whether what happens every so many tokens happens behind a step."""
        batch = self.settings.batch
        if every is None or index >= self.steps * (1 - self.settings.decay):
            return False
        return (index + 1) * batch // every > index * batch // every

    def _restart(self, rows: Rows, dead_F: torch.Tensor, index: int, transcodes: bool) -> torch.Tensor:
        """Give dead features new rows; which of this rank's have them. Collective."""
        objective, seed = self._rows, self.settings.seed
        assert objective is not None
        if isinstance(objective, TreeObjective):
            return regrow(objective, rows, dead_F, seed, index)
        residual_BD, seen_BD = -objective.unexplained_BD, objective.seen_BD if transcodes else None
        return resample(rows, dead_F, residual_BD, seed, index, self.ranks, seen_BD)

    def _count(self, z_BK: torch.Tensor, indices_BK: torch.Tensor) -> None:
        """Tokens since each feature fired, over the batches of all ranks."""
        fired_F = kernels(self.dictionary.b_dec, z_BK).fired(z_BK, indices_BK, len(self.since_fired_F))
        fired_F = self.ranks.any(fired_F)
        # Times 0 or 1: to write where a mask says so takes several times as long.
        self.since_fired_F.add_(self.settings.batch).mul_(1 - fired_F)
        self._spared -= self.settings.batch
        if self.balance is not None:
            self.balance.count(z_BK, indices_BK)


def sparsity_weight(step: int, steps: int, settings: Train) -> float:
    """Weight of the loss that keeps features few: rises from zero, linearly.

    >>> settings = Train(tokens=10, batch=1, sparsity={"weight": 2.0, "warmup": 0.5})
    >>> [sparsity_weight(step, 10, settings) for step in (0, 2, 4, 9)]
    [0.4, 1.2, 2.0, 2.0]
    """
    sparsity = settings.sparsity or Sparsity()
    return sparsity.weight * min(1.0, (step + 1) / max(1.0, sparsity.warmup * steps))
