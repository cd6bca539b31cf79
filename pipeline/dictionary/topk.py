"""Encoding with top-k: the only step of training whose cost grows with every feature.

The forward pass is one matrix product and a top-k; the backward pass touches only what fired. Shapes:
B tokens, D width, F features, K active features of a token, A auxiliary ones.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn.functional import embedding_bag

GATHER_ELEMENTS = 2**22


def top_k(pre_BF: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest pre-activations of each token, rectified. Shapes (B, K), (B, K)."""
    values_BK, indices_BK = pre_BF.topk(k, dim=1, sorted=False)
    return values_BK.relu_(), indices_BK


class ByFeature(NamedTuple):
    """A code turned over: which tokens fired each feature.

    `order_N` sorts the code's N = B K entries by feature, `starts_F` says where each feature's entries begin.
    """

    order_N: torch.Tensor
    starts_F: torch.Tensor


def by_feature(indices_BK: torch.Tensor, features: int) -> ByFeature:
    """Sort a code by feature. Stable, so that a feature's tokens are always summed in batch order."""
    flat_N = indices_BK.reshape(-1).int()
    starts_F = torch.zeros(features + 1, dtype=torch.int64, device=flat_N.device)
    torch.cumsum(torch.bincount(flat_N, minlength=features), 0, out=starts_F[1:])
    return ByFeature(flat_N.argsort(stable=True), starts_F[:-1])


def feature_sums(by: ByFeature, values_BK: torch.Tensor, x_BD: torch.Tensor) -> torch.Tensor:
    """For every feature the sum of value * x over the tokens that fired it: B K d multiplications. Shape (F, D)."""
    tokens_N = by.order_N.div(values_BK.shape[1], rounding_mode="floor")
    weights_N = values_BK.reshape(-1)[by.order_N]
    return embedding_bag(tokens_N, x_BD, by.starts_F, per_sample_weights=weights_N, mode="sum")


def decode(z_BK: torch.Tensor, indices_BK: torch.Tensor, W_FD: torch.Tensor) -> torch.Tensor:
    """Sum of the active rows, weighted: gathers K rows a token. Shape (B, D)."""
    return embedding_bag(indices_BK, W_FD, per_sample_weights=z_BK, mode="sum")


class EncodeTopK(torch.autograd.Function):
    """`top_k(x W_enc^T + b_enc)`, and where asked the best `aux_k` among the dead features as well.

    Both codes come from one set of pre-activations. The backward pass sums over the tokens that fired
    each feature: B K d multiplications instead of B F d. Gradients of the auxiliary code reach the
    encoder the same way.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_BD: torch.Tensor,
        W_enc_FD: torch.Tensor,
        b_enc_F: torch.Tensor,
        k: int,
        dead_F: torch.Tensor | None,
        aux_k: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns z_BK, indices_BK, aux_z_BA, aux_indices_BA (A = 0 without dead features)."""
        pre_BF = torch.addmm(b_enc_F, x_BD, W_enc_FD.T)
        z_BK, indices_BK = top_k(pre_BF, k)
        aux_z_BA, aux_indices_BA = z_BK[:, :0], indices_BK[:, :0]
        if dead_F is not None and aux_k:
            dead = dead_F.nonzero().squeeze(1)
            aux_z_BA, places_BA = top_k(pre_BF[:, dead], min(aux_k, len(dead)))
            aux_indices_BA = dead[places_BA]
        ctx.save_for_backward(x_BD, W_enc_FD, z_BK, indices_BK, aux_z_BA, aux_indices_BA)
        ctx.mark_non_differentiable(indices_BK, aux_indices_BA)
        return z_BK, indices_BK, aux_z_BA, aux_indices_BA

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x, W_enc and b_enc; an entry that was rectified to zero gets none."""
        x_BD, W_enc_FD, z_BK, indices_BK, aux_z_BA, aux_indices_BA = ctx.saved_tensors
        grad_z_BK, _, grad_aux_BA, _ = gradients
        indices_BN = torch.cat([indices_BK, aux_indices_BA], 1)
        values_BN = torch.cat([grad_z_BK * (z_BK > 0), grad_aux_BA * (aux_z_BA > 0)], 1)
        by = by_feature(indices_BN, len(W_enc_FD))
        grad_W_FD = feature_sums(by, values_BN, x_BD)
        grad_b_F = feature_sums(by, values_BN, x_BD.new_ones(len(x_BD), 1)).squeeze(1)
        grad_x_BD = decode(values_BN, indices_BN, W_enc_FD) if ctx.needs_input_grad[0] else None
        return grad_x_BD, grad_W_FD, grad_b_F, None, None, None


class Decode(torch.autograd.Function):
    """`decode` with a backward pass that touches only the rows that fired."""

    @staticmethod
    def forward(ctx: Any, z_BK: torch.Tensor, indices_BK: torch.Tensor, W_dec_FD: torch.Tensor) -> torch.Tensor:
        """Returns (B, D)."""
        ctx.save_for_backward(z_BK, indices_BK, W_dec_FD)
        return decode(z_BK, indices_BK, W_dec_FD)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of z and W_dec."""
        z_BK, indices_BK, W_dec_FD = ctx.saved_tensors
        grad_BD = gradients[0].contiguous()
        grad_z_BK = torch.empty_like(z_BK)
        # Blocks of tokens bound the (block, K, D) gather.
        block = max(1, GATHER_ELEMENTS // max(1, indices_BK.shape[1] * W_dec_FD.shape[1]))
        for start in range(0, len(z_BK), block):
            span = slice(start, start + block)
            grad_z_BK[span] = torch.bmm(W_dec_FD[indices_BK[span]], grad_BD[span].unsqueeze(2)).squeeze(2)
        grad_W_FD = feature_sums(by_feature(indices_BK, len(W_dec_FD)), z_BK, grad_BD)
        return grad_z_BK, None, grad_W_FD
