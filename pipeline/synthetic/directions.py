"""The true directions of a world: random unit vectors, pushed apart where the manifest asks for it."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import normalize

from pipeline.synthetic.draws import Use, generator

# Directions of one generator, so that any of them can be made without those before.
BLOCK = 4096


def random_directions(features: int, width: int, seed: int, first: int = 0, end: int | None = None) -> torch.Tensor:
    """Random unit vectors [first, end): a pure function of seed and block. Shape (end - first, D), float32."""
    end = features if end is None else end
    made_FD = torch.empty((end - first, width))
    for block in range(first // BLOCK, -(-end // BLOCK)):
        start = block * BLOCK
        low, high = max(first, start), min(end, start + BLOCK)
        drawn = generator(Use.DIRECTIONS, seed, block).standard_normal((high - start, width), dtype=np.float32)
        made_FD[low - first : high - first] = normalize(torch.from_numpy(drawn[low - start :]), dim=1)
    return made_FD


@torch.no_grad()
def pushed_apart(directions_FD: torch.Tensor, steps: int, learning_rate: float) -> torch.Tensor:
    """Unit vectors after gradient steps that lower their squared cosines (the world of SynthSAEBench).

    Adam on sum_{i != j} (w_i . w_j)^2 + F sum_i (|w_i|^2 - 1)^2, whose gradient 4 (W W^T W - |w_i|^2 w_i) +
    4 F (|w_i|^2 - 1) w_i takes W^T W, of width by width, and no matrix of features by features: O(F d^2) a step.

    Args:
        directions_FD: Unit vectors.
        steps: How far; 0 leaves them as they are.
        learning_rate: Of Adam.
    """
    if steps == 0:
        return directions_FD
    W_FD = directions_FD.clone()
    optimizer = torch.optim.Adam([W_FD], lr=learning_rate)
    for _ in range(steps):
        square_F1 = W_FD.square().sum(1, keepdim=True)
        W_FD.grad = 4.0 * (W_FD @ (W_FD.T @ W_FD) - square_F1 * W_FD)
        W_FD.grad += 4.0 * len(W_FD) * (square_F1 - 1.0) * W_FD
        optimizer.step()
    return normalize(W_FD, dim=1)


def bias(width: int, norm: float, seed: int) -> torch.Tensor:
    """A constant vector of this norm in a random direction. Shape (D,)."""
    drawn = torch.from_numpy(generator(Use.BIAS, seed).standard_normal(width, dtype=np.float32))
    return normalize(drawn, dim=0) * norm
