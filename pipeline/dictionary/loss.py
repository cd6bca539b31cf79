"""What training minimises. Inputs are scaled so that their variance sums to d: the main term reads as FVU."""

from __future__ import annotations

import torch

from pipeline.dictionary.model import Code


def reconstruction(x_BD: torch.Tensor, x_hat_BD: torch.Tensor) -> torch.Tensor:
    """Mean squared error. Scalar."""
    return (x_hat_BD - x_BD).square().mean()


def auxiliary(x_BD: torch.Tensor, code: Code, residual: torch.Tensor | None = None) -> torch.Tensor:
    """AuxK (Gao et al. 2024, appendix A.2): how much of the residual the dead features fail to predict.

    Normalised by the residual's own mean square; the residual is a target, no gradient flows into it.
    Zero where no feature is dead. Scalar.

    Args:
        x_BD: Activations.
        code: What was made of them.
        residual: Its mean square, where the tokens are a part of a batch: that of the whole one.
    """
    if code.error_hat_BD is None:
        return x_BD.new_zeros(())
    error_BD = (x_BD - code.x_hat_BD).detach()
    residual = error_BD.square().mean() if residual is None else residual
    return (code.error_hat_BD - error_BD).square().mean() / residual.clamp_min(1e-12)
