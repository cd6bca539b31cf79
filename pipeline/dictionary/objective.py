"""What a training step minimises, and its gradients, as a module that the engine runs.

Two ways to the same loss. `DenseObjective` is differentiated by autograd and leaves gradients in the shape of the
weights: for any optimizer, and for what DeepSpeed shards. `RowObjective` goes from the error straight back to the code
and leaves what `RowAdam` needs to move the rows that fired: no gradient in the shape of the weights ever exists.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import nn

from pipeline.dictionary import loss, sharding
from pipeline.dictionary.kernels.portable import RowGradient, weighted
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
    """

    def __init__(self, dictionary: TopKDictionary, aux_k: int, aux_weight: float) -> None:
        super().__init__()
        self.dictionary, self.aux_k, self.aux_weight = dictionary, aux_k, aux_weight

    def forward(self, x_BD: torch.Tensor, dead_F: torch.Tensor | None) -> Made:
        """The loss of a batch; `dead_F` says which features are dead, None that there are none."""
        code = self.dictionary(x_BD, dead_F, self.aux_k)
        main, auxiliary = loss.reconstruction(x_BD, code.x_hat_BD), loss.auxiliary(x_BD, code)
        return Made(main + self.aux_weight * auxiliary, main, auxiliary, code.z_BK, code.indices_BK)


class RowObjective(nn.Module):
    """The same loss, differentiable by b_dec alone; for the rows there is `pending`.

    Ranks that share the features never send weights or gradients: they agree on the k largest values (see `sharding`)
    and add up their reconstructions (B D numbers). Ranks that share a batch gather what came of their tokens (2 B D +
    3 B K numbers, where gradients would be 2 F D): each has the whole batch's loss and moves the same rows by the same
    bits, so the weights are those of one rank.

    Args:
        dictionary: What is trained: this rank's features.
        aux_k: Most dead features that try to predict a token's residual.
        aux_weight: Of their loss.
        ranks: This rank's place.
    """

    def __init__(self, dictionary: TopKDictionary, aux_k: int, aux_weight: float, ranks: Ranks) -> None:
        super().__init__()
        self.dictionary, self.aux_k, self.aux_weight, self.ranks = dictionary, aux_k, aux_weight, ranks
        self.pending: RowGradient | None = None
        for weights in (dictionary.W_enc, dictionary.b_enc, dictionary.W_dec):
            weights.requires_grad_(False)

    def forward(self, x_BD: torch.Tensor, dead_F: torch.Tensor | None) -> Made:
        """The loss of a batch; `dead_F` says which features are dead, None that there are none."""
        made = _Rows.apply(self.dictionary.b_dec, x_BD, dead_F, self)  # type: ignore[no-untyped-call]
        return Made(*made)


class _Rows(torch.autograd.Function):
    """Both passes at once; autograd only learns the gradient of b_dec."""

    @staticmethod
    def forward(
        ctx: Any, b_dec_D: torch.Tensor, x_BD: torch.Tensor, dead_F: torch.Tensor | None, objective: RowObjective
    ) -> tuple[torch.Tensor, ...]:
        dictionary, ranks = objective.dictionary, objective.ranks
        W_enc_FD, W_dec_FD, b_enc_F = (each.detach() for each in (dictionary.W_enc, dictionary.W_dec, dictionary.b_enc))
        with_ = kernels(W_enc_FD, x_BD)
        count = x_BD.numel() * ranks.data
        centred_BD = x_BD - b_dec_D
        z_BK, indices_BK = sharding.top_k(centred_BD, W_enc_FD, b_enc_F, dictionary.k, ranks)
        scale = 2.0 / count
        error_BD, grad_z_BK, squares_B = _errors(z_BK, indices_BK, W_dec_FD, b_dec_D, x_BD, scale, ranks)
        main = ranks.gather(squares_B, "scalars").sum() / count
        auxiliary, aux_error_BD, aux_scale = torch.zeros_like(main), None, 0.0
        z_BN, indices_BN, grad_z_BN, part_BN = z_BK, indices_BK, grad_z_BK, None
        if dead_F is not None and objective.aux_k:
            dead = dead_F.nonzero().squeeze(1)
            few = min(objective.aux_k, int(ranks.total(torch.tensor(len(dead), device=x_BD.device), "scalars")))
            aux_z_BA, places_BA = sharding.top_k(centred_BD, W_enc_FD[dead], b_enc_F[dead], few, ranks)
            # Where a rank has no dead feature, places are those of none.
            aux_indices_BA = dead[places_BA] if len(dead) else places_BA
            # The residual is -error; predicting it leaves prediction + error. Its own mean square normalises the loss.
            normal = float(main.clamp_min(1e-12))
            aux_scale = objective.aux_weight * scale / normal
            made = _errors(aux_z_BA, aux_indices_BA, W_dec_FD, None, -error_BD, aux_scale, ranks)
            aux_error_BD, grad_aux_BA, squares_B = made
            auxiliary = ranks.gather(squares_B, "scalars").sum() / count / normal
            z_BN, grad_z_BN = torch.cat([z_BK, aux_z_BA], 1), torch.cat([grad_z_BK, grad_aux_BA], 1)
            indices_BN = torch.cat([indices_BK, aux_indices_BA], 1)
            aux_error_BD = ranks.gather(aux_error_BD, "rows")
            part_BN = torch.zeros(len(aux_error_BD), z_BN.shape[1], dtype=torch.uint8, device=x_BD.device)
            part_BN[:, z_BK.shape[1] :] = 1
        centred_BD, error_BD = ranks.gather(centred_BD, "rows"), ranks.gather(error_BD, "rows")
        z_BN, grad_z_BN = ranks.gather(z_BN, "codes"), ranks.gather(grad_z_BN, "codes")
        grouped = with_.group(z_BN, ranks.gather(indices_BN, "codes"), dictionary.features)
        errors, scales = (
            ((error_BD,), (scale,)) if aux_error_BD is None else ((error_BD, aux_error_BD), (scale, aux_scale))
        )
        objective.pending = RowGradient(grouped, z_BN, grad_z_BN, centred_BD, errors, scales, part_BN)
        # b_dec is added to every reconstruction, and taken off everything that is encoded.
        fired_F = with_.sums(grouped, grad_z_BN, x_BD.new_ones(len(z_BN), 1)).squeeze(1)
        encoded_D = ranks.total(weighted(W_enc_FD, fired_F), "b_dec")
        ctx.save_for_backward(scale * error_BD.sum(0) - encoded_D)
        ctx.mark_non_differentiable(indices_BK)
        total = main + objective.aux_weight * auxiliary
        return total.float(), main.float(), auxiliary.float(), z_BK, indices_BK

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_b_dec_D,) = ctx.saved_tensors
        return cast(torch.Tensor, gradients[0] * grad_b_dec_D), None, None, None


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
