"""Top-k over features that lie on several ranks: exactly the features that one rank would find.

Every rank sends its m largest values of each token, not their features. With the values of all ranks each one knows how
many of its own are among the k largest. Where a rank's last value is among them, more of its values might have been:
those few tokens are asked again, for k values. So the result is certain, and m can be little more than k / P.
"""

from __future__ import annotations

import math

import torch

from pipeline.dictionary import topk
from pipeline.dictionary.ranks import Ranks


def asked(k: int, ranks: int) -> int:
    """Values that each rank sends first: its fair share of k, and three standard deviations.

    >>> [asked(32, ranks) for ranks in (1, 2, 4, 64)]
    [32, 28, 17, 3]
    """
    return min(k, math.ceil(k / ranks + 3 * math.sqrt(k / ranks))) if ranks > 1 else k


def top_k(
    x_BD: torch.Tensor, W_fD: torch.Tensor, b_f: torch.Tensor, k: int, ranks: Ranks
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's part of the k largest of relu(x W^T + b) over the features of all ranks.

    Ties go to the lower feature of the lower rank, as they do on one rank: ranks hold the features in order.

    Args:
        x_BD: Tokens, the same on every rank of the feature group.
        W_fD: This rank's encoder rows; there may be none.
        b_f: Their biases.
        k: Active features of a token, over all ranks.
        ranks: This rank's place.

    Returns:
        Values and features, counted from this rank's first. Shapes (B, K), (B, K). Where fewer of this rank's fire, the
        rest of the values is 0.
    """
    if ranks.features == 1:
        return topk.top_k(x_BD, W_fD, b_f, k)
    count = asked(k, ranks.features)
    z_BM, indices_BM = _own(x_BD, W_fD, b_f, count)
    kept_B, again_B = _admitted(ranks.across(z_BM, "values"), k, ranks.feature_rank)
    again = again_B.nonzero().squeeze(1) if count < k else again_B.nonzero()[:0, 0]
    if len(again):
        # Every rank sees the same values, so all ask again for the same tokens. No rank can have more than k.
        more_z, more_indices = _own(x_BD[again], W_fD, b_f, k)
        kept_B[again], _ = _admitted(ranks.across(more_z, "values"), k, ranks.feature_rank)
    z_BK, indices_BK = _widened(z_BM, k), _widened(indices_BM, k)
    if len(again):
        z_BK[again], indices_BK[again] = more_z, more_indices
    place_K = torch.arange(k, device=z_BK.device)
    return z_BK.masked_fill(place_K >= kept_B.unsqueeze(1), 0.0), indices_BK


def _own(x_BD: torch.Tensor, W_fD: torch.Tensor, b_f: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's largest; as many as asked for, be there so many features or not."""
    z, indices = topk.top_k(x_BD, W_fD, b_f, min(count, len(W_fD)))
    return _widened(z, count), _widened(indices, count)


def _widened(values_BM: torch.Tensor, count: int) -> torch.Tensor:
    return torch.nn.functional.pad(values_BM, (0, count - values_BM.shape[1]))


def _admitted(every_PBM: torch.Tensor, k: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """How many of a rank's values are among the k largest, and for which tokens that is not certain.

    Returns:
        Counts, and whether some rank's last value is among the k largest. Shapes (B,), (B,).
    """
    ranks, tokens, count = every_PBM.shape
    values_BN = every_PBM.transpose(0, 1).reshape(tokens, ranks * count)
    # Stable: of equal values that of the lower rank, and there of the lower feature, comes first.
    order_BN = values_BN.sort(dim=1, descending=True, stable=True).indices[:, :k]
    chosen_BN = torch.zeros_like(values_BN, dtype=torch.bool).scatter_(1, order_BN, True)
    # Zeros fill up; what is no number is seen.
    chosen_BPM = (chosen_BN & ~(values_BN <= 0)).view(tokens, ranks, count)
    return chosen_BPM[:, rank].sum(1), chosen_BPM[:, :, -1].any(1)
