"""What a training step minimises, and its gradients, as a module that the engine runs.

Two ways to the same loss. `DenseObjective` is differentiated by autograd and leaves gradients in the shape of the
weights: for any optimizer, and for what DeepSpeed shards. `RowObjective` goes from the error straight back to the code
and leaves what `RowAdam` needs to move the rows that fired: no gradient in the shape of the weights ever exists.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from pipeline.dictionary import loss, sharding
from pipeline.dictionary.activation import Code
from pipeline.dictionary.kernels.portable import RowGradient
from pipeline.dictionary.model import TopKDictionary
from pipeline.dictionary.ranks import Ranks
from pipeline.dictionary.topk import kernels


class Made(NamedTuple):
    """What a pass gives: the loss, its two parts without their weights, and the code of this rank's share.

    Shapes (), (), (), (B, K), (B, K).
    """

    total: torch.Tensor
    main: torch.Tensor
    auxiliary: torch.Tensor
    z_BK: torch.Tensor
    indices_BK: torch.Tensor


class DenseObjective(nn.Module):
    """The loss, differentiable by every weight.

    Args:
        dictionary: What is trained.
        aux_k: Most dead features that try to predict a token's residual.
        aux_weight: Of their loss.
        ranks: This rank's place.
    """

    def __init__(self, dictionary: TopKDictionary, aux_k: int, aux_weight: float, ranks: Ranks | None = None) -> None:
        super().__init__()
        self.dictionary, self.aux_k, self.aux_weight, self.ranks = dictionary, aux_k, aux_weight, ranks or Ranks()
        # Mean square of the whole batch's residual, where a pass sees only some of this rank's tokens.
        self.residual: torch.Tensor | None = None

    def forward(self, x_BD: torch.Tensor, dead_F: torch.Tensor | None) -> Made:
        """The loss of a batch; `dead_F` says which features are dead, None that there are none."""
        code = self.dictionary(x_BD, dead_F, self.aux_k)
        main, residual = loss.reconstruction(x_BD, code.x_hat_BD), self.residual
        if residual is None and code.error_hat_BD is not None:
            residual = self.ranks.mean(main.detach().clone())
        auxiliary = loss.auxiliary(x_BD, code, residual)
        return Made(main + self.aux_weight * auxiliary, main, auxiliary, code.z_BK, code.indices_BK)


class SparseObjective(nn.Module):
    """What leaves `pending` behind a pass: what the gradients of its rows are made of, for `RowAdam`.

    Args:
        dictionary: What is trained: this rank's features.
        ranks: This rank's place.
    """

    def __init__(self, dictionary: TopKDictionary, ranks: Ranks) -> None:
        super().__init__()
        self.dictionary, self.ranks = dictionary, ranks
        # Of the loss that keeps features few; the loop raises it.
        self.sparsity = 0.0
        self.pending: RowGradient | None = None
        # The least value that fired in the last batch.
        self.least = torch.zeros(())
        for weights in (dictionary.W_enc, dictionary.b_enc, dictionary.W_dec):
            weights.requires_grad_(False)
        self.forget()

    def forget(self) -> None:
        """Give back what is kept of the last batch for those who ask behind a step."""
        # All tokens: what was encoded, and the error.
        self.seen_BD = self.unexplained_BD = torch.zeros(0, 0)


class RowObjective(SparseObjective):
    """The same loss, differentiable by b_dec and what else is small; for the rows there is `pending`.

    Ranks that share the features never send weights or gradients: they agree on which features fire (see `sharding`)
    and add up their reconstructions (B D numbers). Ranks that share a batch gather what came of their tokens (2 B D +
    3 B K numbers, where gradients would be 2 F D): each has the whole batch's loss and moves the same rows by the same
    bits, so the weights are those of one rank.

    With prefixes the loss is the mean over nested dictionaries, of the first features of the whole one each (Bussmann
    et al. 2025, "Learning multi-level features with Matryoshka sparse autoencoders").

    Args:
        dictionary: What is trained: this rank's features.
        aux_k: Most dead features that try to predict a token's residual.
        aux_weight: Of their loss.
        ranks: This rank's place.
        prefixes: Features of the nested dictionaries, ascending; the whole one comes behind them.
    """

    def __init__(
        self,
        dictionary: TopKDictionary,
        aux_k: int,
        aux_weight: float,
        ranks: Ranks,
        prefixes: tuple[int, ...] = (),
    ) -> None:
        super().__init__(dictionary, ranks)
        self.aux_k, self.aux_weight, self.prefixes = aux_k, aux_weight, prefixes

    def forward(self, x_BD: torch.Tensor, dead_F: torch.Tensor | None, y_BD: torch.Tensor | None = None) -> Made:
        """The loss of a batch.

        Args:
            x_BD: Activations.
            dead_F: Which features are dead; None where none is.
            y_BD: What a transcoder explains.
        """
        threshold = self.dictionary.threshold
        learned = threshold if threshold is not None and threshold.requires_grad else None
        y_BD = x_BD if y_BD is None else y_BD
        made = _Rows.apply(self.dictionary.b_dec, learned, x_BD, y_BD, dead_F, self)  # type: ignore[no-untyped-call]
        return Made(*made)


class _Rows(torch.autograd.Function):
    """Both passes at once; autograd only learns the gradients of b_dec and of thresholds that are learned."""

    @staticmethod
    def forward(
        ctx: Any,
        b_dec_D: torch.Tensor,
        threshold_F: torch.Tensor | None,
        x_BD: torch.Tensor,
        y_BD: torch.Tensor,
        dead_F: torch.Tensor | None,
        objective: RowObjective,
    ) -> tuple[torch.Tensor, ...]:
        dictionary, ranks = objective.dictionary, objective.ranks
        encoder = dictionary.encoder
        with_ = kernels(encoder.W_FD, x_BD)
        count = y_BD.numel() * ranks.data
        scale = 2.0 / count
        centred_BD = dictionary.centred(x_BD).detach()
        code = dictionary.activation.code(centred_BD, encoder, ranks)
        objective.least = code.least
        explained = _explained(objective, code, y_BD, b_dec_D, scale)
        main = ranks.gather(explained.squares_B, "scalars").sum() / count
        total = ranks.gather(explained.nested_B, "scalars").sum() / count
        sparsity = dictionary.activation.sparsity(code.z_BK, objective.sparsity, y_BD.shape[1], ranks)
        total = total + sparsity.loss
        z_BN, indices_BN, part_BN = code.z_BK, code.indices_BK, explained.part_BK
        grad_z_BN = explained.grad_z_BK
        if sparsity.by_value:
            grad_z_BN = grad_z_BN + sparsity.by_value * (z_BN > 0)
        errors, scales = list(explained.errors), list(explained.scales)
        auxiliary = torch.zeros_like(main)
        if dead_F is not None and objective.aux_k:
            # The residual is -error; predicting it leaves prediction + error. Its own mean square normalises the loss.
            normal = float(main.clamp_min(1e-12))
            scales.append(objective.aux_weight * scale / normal)
            tried = _tried(objective, dead_F, centred_BD, -explained.error_BD, scales[-1])
            auxiliary = ranks.gather(tried.squares_B, "scalars").sum() / count / normal
            total = total + objective.aux_weight * auxiliary
            part_BN = torch.cat([part_BN, torch.full_like(tried.indices_BA, len(errors), dtype=torch.uint8)], 1)
            errors.append(tried.error_BD)
            z_BN, grad_z_BN = torch.cat([z_BN, tried.z_BA], 1), torch.cat([grad_z_BN, tried.grad_z_BA], 1)
            indices_BN = torch.cat([indices_BN, tried.indices_BA], 1)
        errors = [ranks.gather(error_BD, "rows") for error_BD in errors]
        z_BN, grad_z_BN = ranks.gather(z_BN, "codes"), ranks.gather(grad_z_BN, "codes")
        grouped = with_.group(z_BN, ranks.gather(indices_BN, "codes"), dictionary.features)
        parts = ranks.gather(part_BN, "codes") if len(errors) > 1 else None
        seen_BD = ranks.gather(centred_BD, "rows")
        objective.pending = RowGradient(grouped, z_BN, grad_z_BN, (seen_BD,), tuple(errors), tuple(scales), parts)
        objective.seen_BD, objective.unexplained_BD = seen_BD, errors[len(objective.prefixes)]
        # b_dec is added to every reconstruction, and taken off everything that is encoded. The first error is the sum
        # of those of all prefixes.
        grad_b_dec_D = scales[0] * errors[0].sum(0)
        if dictionary.b_in is None:
            fired_F = with_.sums(grouped, grad_z_BN, x_BD.new_ones(len(z_BN), 1)).squeeze(1)
            grad_b_dec_D -= ranks.total(with_.weighted(encoder.W_FD, fired_F), "b_dec")
        grad_threshold_F = None
        if threshold_F is not None:
            by_count = sparsity.by_count / (len(x_BD) * ranks.data)
            grad_threshold_F = _threshold_gradient(objective, code, explained, threshold_F, by_count)
        ctx.save_for_backward(grad_b_dec_D, grad_threshold_F)
        ctx.mark_non_differentiable(code.indices_BK)
        return total.float(), main.float(), auxiliary.float(), code.z_BK, code.indices_BK

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_b_dec_D, grad_threshold_F = ctx.saved_tensors
        by_threshold = None if grad_threshold_F is None else gradients[0] * grad_threshold_F
        return gradients[0] * grad_b_dec_D, by_threshold, None, None, None, None


class _Explained(NamedTuple):
    """What a code leaves unexplained.

    `errors` has, for each prefix, the sum of the errors of all dictionaries that the features of its last part belong
    to: what moves those features. `part_BK` says for each entry which one. `error_BD` and `squares_B` are those of the
    whole dictionary, `nested_B` the mean of squared errors over all prefixes.
    """

    errors: tuple[torch.Tensor, ...]
    scales: tuple[float, ...]
    part_BK: torch.Tensor
    grad_z_BK: torch.Tensor
    error_BD: torch.Tensor
    squares_B: torch.Tensor
    nested_B: torch.Tensor


def _explained(
    objective: RowObjective, code: Code, x_BD: torch.Tensor, b_dec_D: torch.Tensor, scale: float
) -> _Explained:
    dictionary, ranks, W_FD = objective.dictionary, objective.ranks, objective.dictionary.W_dec.detach()
    part_BK = torch.zeros_like(code.indices_BK, dtype=torch.uint8)
    if not objective.prefixes:
        error_BD, grad_z_BK, squares_B = _errors(code.z_BK, code.indices_BK, W_FD, b_dec_D, x_BD, scale, ranks)
        return _Explained((error_BD,), (scale,), part_BK, grad_z_BK, error_BD, squares_B, squares_B)
    with_ = kernels(W_FD, code.z_BK)
    ends = torch.tensor(objective.prefixes, device=x_BD.device)
    feature_BK = code.indices_BK + ranks.feature_rank * dictionary.features
    part_BK = torch.bucketize(feature_BK, ends, right=True).to(torch.uint8)
    parts = [code.z_BK * (part_BK == part) for part in range(len(ends) + 1)]
    error_BD, every, nested_B = b_dec_D - x_BD, [], torch.zeros(len(x_BD), dtype=torch.float64, device=x_BD.device)
    for z_BK in parts:
        error_BD = error_BD + ranks.total(with_.decode(z_BK, code.indices_BK, W_FD), "rows")
        every.append(error_BD)
        nested_B += error_BD.double().square().sum(1) / len(parts)
    scale /= len(parts)
    errors, sum_BD, grad_z_BK = [], torch.zeros_like(error_BD), torch.zeros_like(code.z_BK)
    for z_BK, own_BD in zip(reversed(parts), reversed(every), strict=True):
        sum_BD = sum_BD + own_BD
        errors.append(sum_BD)
        grad_z_BK += with_.inner(sum_BD, z_BK, code.indices_BK, W_FD) * scale
    errors.reverse()
    squares_B = error_BD.double().square().sum(1)
    return _Explained(tuple(errors), (scale,) * len(parts), part_BK, grad_z_BK, error_BD, squares_B, nested_B)


class _Tried(NamedTuple):
    """The dead features' try at what was left unexplained."""

    z_BA: torch.Tensor
    indices_BA: torch.Tensor
    error_BD: torch.Tensor
    grad_z_BA: torch.Tensor
    squares_B: torch.Tensor


def _tried(
    objective: RowObjective, dead_F: torch.Tensor, centred_BD: torch.Tensor, residual_BD: torch.Tensor, scale: float
) -> _Tried:
    ranks, encoder = objective.ranks, objective.dictionary.encoder
    dead = dead_F.nonzero().squeeze(1)
    few = min(objective.aux_k, int(ranks.total(torch.tensor(len(dead), device=dead.device), "scalars")))
    z_BA, places_BA = sharding.top_k(centred_BD, encoder.W_FD[dead], encoder.b_F[dead], few, ranks)
    # Where a rank has no dead feature, places are those of none.
    indices_BA = dead[places_BA] if len(dead) else places_BA
    W_dec_FD = objective.dictionary.W_dec.detach()
    error_BD, grad_z_BA, squares_B = _errors(z_BA, indices_BA, W_dec_FD, None, residual_BD, scale, ranks)
    return _Tried(z_BA, indices_BA, error_BD, grad_z_BA, squares_B)


def _threshold_gradient(
    objective: RowObjective, code: Code, explained: _Explained, threshold_F: torch.Tensor, by_count: float
) -> torch.Tensor:
    """The straight-through estimate (Rajamanoharan et al. 2024, equations 11 and 12). Shape (F,)."""
    assert code.near_BK is not None
    ranks, W_FD = objective.ranks, objective.dictionary.W_dec.detach()
    near_BK = code.near_BK.float()
    products_BK = torch.zeros_like(code.z_BK)
    for part, (error_BD, scale) in enumerate(zip(explained.errors, explained.scales, strict=True)):
        mine_BK = near_BK * (explained.part_BK == part)
        products_BK += kernels(W_FD, error_BD).inner(error_BD, mine_BK, code.indices_BK, W_FD) * scale
    moved_BK = -near_BK / code.bandwidth * (threshold_F[code.indices_BK] * products_BK + by_count)
    moved_BK, indices_BK = ranks.gather(moved_BK, "codes"), ranks.gather(code.indices_BK, "codes")
    made_F = torch.zeros_like(threshold_F, dtype=torch.float64)
    return made_F.index_add_(0, indices_BK.reshape(-1), moved_BK.reshape(-1).double()).float()


def _errors(
    z_BK: torch.Tensor,
    indices_BK: torch.Tensor,
    W_FD: torch.Tensor,
    bias_D: torch.Tensor | None,
    target_BD: torch.Tensor,
    scale: float,
    ranks: Ranks,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `portable.errors`, of a code that lies on several ranks."""
    with_ = kernels(W_FD, z_BK)
    if ranks.features == 1:
        made: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = with_.errors(
            z_BK, indices_BK, W_FD, bias_D, target_BD, scale
        )
        return made
    error_BD = ranks.total(with_.decode(z_BK, indices_BK, W_FD), "rows")
    if bias_D is not None:
        error_BD += bias_D
    error_BD -= target_BD
    return error_BD, with_.inner(error_BD, z_BK, indices_BK, W_FD) * scale, error_BD.double().square().sum(1)
