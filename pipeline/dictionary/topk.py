"""Encoding with top-k, and its gradients: the one matrix product of a step, and what touches only what fired.

Shapes: B tokens, D width, F features, K active features of a token, A auxiliary ones.
"""

from __future__ import annotations

import functools
import importlib.util
from types import ModuleType
from typing import Any

import torch

from pipeline.dictionary.kernels import native, portable


@functools.cache
def has_triton() -> bool:
    """Whether there is what compiles kernels for a GPU; torch's builds for CUDA bring it."""
    return importlib.util.find_spec("triton") is not None


def kernels(rows: torch.Tensor, *others: torch.Tensor) -> ModuleType:
    """What computes with a dictionary's rows and other tensors: what was compiled for where they are, else torch."""
    if native.fits(rows, *others):
        return native
    if rows.device.type == "cuda" and has_triton():
        # Imported by who needs it: it takes a second.
        from pipeline.dictionary.kernels import cuda

        if cuda.fits(rows, *others):
            return cuda
    return portable


def top_k(x_BD: torch.Tensor, W_FD: torch.Tensor, b_F: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See `portable.top_k`."""
    made: tuple[torch.Tensor, torch.Tensor] = kernels(W_FD, x_BD, b_F).top_k(x_BD, W_FD, b_F, k)
    return made


def decode(
    z_BK: torch.Tensor, indices_BK: torch.Tensor, W_FD: torch.Tensor, bias_D: torch.Tensor | None = None
) -> torch.Tensor:
    """See `portable.decode`."""
    made: torch.Tensor = kernels(W_FD, z_BK).decode(z_BK, indices_BK, W_FD, bias_D)
    return made


class EncodeTopK(torch.autograd.Function):
    """`top_k(x W_enc^T + b_enc)`, and where asked the best `aux_k` among the dead features as well.

    The backward pass sums over the tokens that fired each feature: B K d multiplications instead of B F d. Gradients
    of the auxiliary code reach the encoder the same way.
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
        z_BK, indices_BK = top_k(x_BD, W_enc_FD, b_enc_F, k)
        aux_z_BA, aux_indices_BA = z_BK[:, :0], indices_BK[:, :0]
        if dead_F is not None and aux_k:
            dead = dead_F.nonzero().squeeze(1)
            aux_z_BA, places_BA = top_k(x_BD, W_enc_FD[dead], b_enc_F[dead], min(aux_k, len(dead)))
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
        with_ = kernels(W_enc_FD, values_BN, x_BD)
        grouped = with_.group(values_BN, indices_BN, len(W_enc_FD))
        grad_W_FD = with_.sums(grouped, values_BN, x_BD)
        grad_b_F = with_.sums(grouped, values_BN, x_BD.new_ones(len(x_BD), 1)).squeeze(1)
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
        with_ = kernels(W_dec_FD, z_BK)
        grad_z_BK = with_.inner(grad_BD, z_BK, indices_BK, W_dec_FD)
        grad_W_FD = with_.sums(with_.group(z_BK, indices_BK, len(W_dec_FD)), z_BK, grad_BD)
        return grad_z_BK, None, grad_W_FD
