"""Adam for a dictionary: keeps decoder rows on the unit sphere, and the rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from pipeline.dictionary.model import TopKDictionary
from schemas.manifest import Train


class SphereAdam(torch.optim.Adam):
    """Adam whose decoder rows stay unit vectors.

    Before a step the part of the gradient along each row is removed (it could only change the row's
    length), after it the rows are normalised. Without the first, Adam's second moment would remember
    motion that never happens.

    Args:
        dictionary: What to train.
        learning_rate: Initial rate.
        betas: Decay of both moments.
    """

    def __init__(self, dictionary: TopKDictionary, learning_rate: float, betas: tuple[float, float]) -> None:
        super().__init__(dictionary.parameters(), lr=learning_rate, betas=betas, eps=1e-8, fused=True)
        self._W_dec = dictionary.W_dec

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One update."""
        W_FD, grad_FD = self._W_dec, self._W_dec.grad
        if grad_FD is not None:
            along_F1 = torch.linalg.vecdot(grad_FD, W_FD).unsqueeze(1)
            grad_FD.addcmul_(along_F1, W_FD, value=-1.0)
        result = super().step(closure)
        W_FD.div_(torch.linalg.vector_norm(W_FD, dim=1, keepdim=True).clamp_min_(1e-12))
        return result


def peak_rate(settings: Train, features: int) -> float:
    """The largest rate: as given, or 2e-4 at 2^14 features and falling with the square root of F."""
    return settings.learning_rate or 2e-4 * math.sqrt(2**14 / features)


def rate(step: int, steps: int, peak: float, warmup: float, decay: float) -> float:
    """Rate of a step: a linear rise, a plateau, a linear fall that would end at zero behind the last step.

    >>> [round(rate(step, 10, 1.0, 0.2, 0.4), 2) for step in range(10)]
    [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    rise = (step + 1) / max(1.0, warmup * steps)
    fall = (steps - step) / max(1.0, decay * steps)
    return peak * min(1.0, rise, fall)
