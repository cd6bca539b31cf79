"""What training minimises. Inputs are scaled so that their variance sums to d: the main term reads as FVU."""

from __future__ import annotations

import torch

from pipeline.dictionary.model import Code


def reconstruction(x_BD: torch.Tensor, x_hat_BD: torch.Tensor) -> torch.Tensor:
    """Mean squared error. Scalar."""
    return (x_hat_BD - x_BD).square().mean()


def auxiliary(x_BD: torch.Tensor, code: Code) -> torch.Tensor:
    """AuxK (Gao et al. 2024, appendix A.2): how much of the residual the dead features fail to predict.

    Normalised by the residual's own mean square; the residual is a target, no gradient flows into it.
    Zero where no feature is dead. Scalar.
    """
    if code.error_hat_BD is None:
        return x_BD.new_zeros(())
    error_BD = (x_BD - code.x_hat_BD).detach()
    return (code.error_hat_BD - error_BD).square().mean() / error_BD.square().mean().clamp_min(1e-12)
