"""Directions and codes that recovery is tested with."""

from __future__ import annotations

import torch
from torch.nn.functional import normalize


def directions(rows: int, width: int, seed: int) -> torch.Tensor:
    """Random unit rows."""
    return normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def near(rows_RD: torch.Tensor, cosines_R: torch.Tensor, seed: int) -> torch.Tensor:
    """For every unit row another one, at exactly the cosine given."""
    noise_RD = torch.randn(rows_RD.shape, generator=torch.Generator().manual_seed(seed))
    across_RD = normalize(noise_RD - (noise_RD * rows_RD).sum(1, keepdim=True) * rows_RD, dim=1)
    cosines_R1 = cosines_R[:, None]
    return cosines_R1 * rows_RD + (1 - cosines_R1.square()).sqrt() * across_RD


def sparse(dense_NM: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which features are not 0, token by token: where each token's begin, and the features."""
    active = dense_NM != 0
    starts = torch.zeros(len(dense_NM) + 1, dtype=torch.int64)
    torch.cumsum(active.sum(1), 0, out=starts[1:])
    return starts, active.nonzero()[:, 1]


def code(dense_NF: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest entries of each token, as a dictionary's code has them."""
    z_NK, indices_NK = dense_NF.topk(k, 1)
    return z_NK, indices_NK
