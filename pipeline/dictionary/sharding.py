"""Top-k over features that lie on several ranks: exactly the features that one rank would find.

Every rank sends its m largest values of each token, not their features. With the values of all ranks each one knows how
many of its own are among the k largest. Where a rank's last value is among them, more of its values might have been:
those few tokens are asked again, for k values. So the result is certain, and m can be little more than k / P.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from pipeline.dictionary import topk
from pipeline.dictionary.ranks import Ranks

# Values that a search for all positive ones may keep at once.
CANDIDATES = 2**21


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
    return agreed(lambda tokens, count: _own(x_BD[tokens], W_fD, b_f, count), k, ranks)


# This rank's largest of some tokens, as many as asked for: values, largest first, and features.
Own = Callable[[slice | torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]


def agreed(own: Own, k: int, ranks: Ranks) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's part of the k largest values of all ranks; see `top_k`.

    Args:
        own: Finds this rank's largest; what is not above zero is 0.
        k: Values of a token, over all ranks.
        ranks: This rank's place.
    """
    count = asked(k, ranks.features)
    z_BM, indices_BM = own(slice(None), count)
    kept_B, again_B = _admitted(ranks.across(z_BM, "values"), k, ranks.feature_rank)
    again = again_B.nonzero().squeeze(1) if count < k else again_B.nonzero()[:0, 0]
    if len(again):
        # Every rank sees the same values, so all ask again for the same tokens. No rank can have more than k.
        more_z, more_indices = own(again, k)
        kept_B[again], _ = _admitted(ranks.across(more_z, "values"), k, ranks.feature_rank)
    z_BK, indices_BK = _widened(z_BM, k), _widened(indices_BM, k)
    if len(again):
        z_BK[again], indices_BK[again] = more_z, more_indices
    place_K = torch.arange(k, device=z_BK.device)
    return z_BK.masked_fill(place_K >= kept_B.unsqueeze(1), 0.0), indices_BK


def among(z_BM: torch.Tensor, k: int, ranks: Ranks) -> torch.Tensor:
    """Of this rank's part of more values than k: those that are among the k largest of all ranks. Shape (B, K)."""
    if ranks.features == 1:
        return z_BM[:, :k]
    kept_B, _ = _admitted(ranks.across(z_BM, "values"), k, ranks.feature_rank)
    place_K = torch.arange(k, device=z_BM.device)
    return z_BM[:, :k].masked_fill(place_K >= kept_B.unsqueeze(1), 0.0)


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


class Chosen(NamedTuple):
    """A code of this rank's features for its tokens, and the least value that fires anywhere in the batch.

    Entries come largest first; what does not fire is 0. Shapes (B, K), (B, K), ().
    """

    z_BK: torch.Tensor
    indices_BK: torch.Tensor
    least: torch.Tensor


def batch_top_k(x_BD: torch.Tensor, W_fD: torch.Tensor, b_f: torch.Tensor, k: int, ranks: Ranks) -> Chosen:
    """This rank's part of the k B largest of relu(x W^T + b) over a whole batch of B tokens (Bussmann et al. 2024).

    Every rank shows its largest values of its tokens. The one at place k B is a threshold; a token of which some rank's
    last value reaches it may have more, so those are asked again for twice as many, until none is left: the result is
    certain. Of equal values at the threshold those of the first tokens fire, and there of the lower features.

    Args:
        x_BD: This rank's tokens, the same on every rank of the feature group.
        W_fD: This rank's encoder rows.
        b_f: Their biases.
        k: Active features of a token on average, over all ranks.
        ranks: This rank's place.
    """
    width = min(len(W_fD), 2 * asked(k, ranks.features))
    z_BM, indices_BM = topk.top_k(x_BD, W_fD, b_f, width)
    while True:
        # Of all tokens and all features, in their order on one rank. Shape (P, T, M), T the whole batch.
        every_PTM = ranks.across(ranks.gather(z_BM, "values"), "values")
        least, kept_PT = _above(every_PTM, k * every_PTM.shape[1])
        full_PT = (kept_PT == width) & (every_PTM[:, :, -1] > 0)
        if width == len(W_fD) or not bool(full_PT.any()):
            break
        first = ranks.data_rank * len(x_BD)
        again = full_PT[ranks.feature_rank, first : first + len(x_BD)].nonzero().squeeze(1)
        width = min(len(W_fD), 2 * width)
        z_BM, indices_BM = _widened(z_BM, width), _widened(indices_BM, width)
        if len(again):
            z_BM[again], indices_BM[again] = topk.top_k(x_BD[again], W_fD, b_f, width)
    own_T = kept_PT[ranks.feature_rank]
    # As wide on every rank of the data group: they gather their codes.
    width = max(1, int(own_T.max()))
    kept_B1 = own_T[ranks.data_rank * len(x_BD) :][: len(x_BD)].unsqueeze(1)
    z_BM, indices_BM = z_BM[:, :width].contiguous(), indices_BM[:, :width].contiguous()
    return Chosen(z_BM.masked_fill(torch.arange(width, device=z_BM.device) >= kept_B1, 0.0), indices_BM, least)


def _above(every_PTM: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The least of the `count` largest values, and how many of every rank's and token's are among them.

    Values lie in descending order. What is no number is among the largest, to be seen. Shapes (), (P, T).
    """
    ranks, tokens, width = every_PTM.shape
    positive_PTM = ~(every_PTM <= 0)
    if int(positive_PTM.sum()) <= count:
        kept_PT = positive_PTM.sum(2)
        return every_PTM.where(every_PTM > 0, float("inf")).min(), kept_PT
    flat_N = every_PTM.reshape(-1)
    least = _ascending_at(flat_N.nan_to_num(float("inf")), len(flat_N) - count)
    above_PTM, equal_PTM = ~(every_PTM <= least), every_PTM == least
    # Equal ones fire in the order of tokens, and for each in that of features.
    equal_TN = equal_PTM.transpose(0, 1).reshape(tokens, ranks * width)
    room = count - int(above_PTM.sum())
    taken_TN = equal_TN & (equal_TN.reshape(-1).cumsum(0).view_as(equal_TN) <= room)
    taken_PTM = taken_TN.view(tokens, ranks, width).transpose(0, 1)
    return least, above_PTM.sum(2) + taken_PTM.sum(2)


def _ascending_at(values_N: torch.Tensor, place: int) -> torch.Tensor:
    """What is at a place in ascending order. Shape ()."""
    if values_N.device.type == "cpu":
        return values_N.kthvalue(place + 1).values
    # A GPU's kthvalue counts as not deterministic, and is refused where only what is may run.
    return values_N.sort().values[place]


def positive(x_BD: torch.Tensor, W_fD: torch.Tensor, b_f: torch.Tensor, guess: int, ranks: Ranks) -> Chosen:
    """All of relu(x W^T + b) that is above zero, of this rank's features.

    Args:
        x_BD: This rank's tokens.
        W_fD: This rank's encoder rows.
        b_f: Their biases.
        guess: Features that a token may have; those with more are asked again for twice as many, and so on.
        ranks: This rank's place.
    """
    width = min(len(W_fD), guess)
    z_BK, indices_BK = topk.top_k(x_BD, W_fD, b_f, width)
    left = z_BK[:, -1].gt(0).nonzero().squeeze(1)
    while len(left) and width < len(W_fD):
        width = min(len(W_fD), 2 * width)
        z_BK, indices_BK = _widened(z_BK, width), _widened(indices_BK, width)
        # Candidates take more memory than codes.
        for some in torch.split(left, max(1, CANDIDATES // width)):
            z_BK[some], indices_BK[some] = topk.top_k(x_BD[some], W_fD, b_f, width)
        left = left[z_BK[left, -1] > 0]
    width = max(1, ranks.most(int((z_BK != 0).sum(1).max()) if len(z_BK) else 0))
    z_BK, indices_BK = _fitted(z_BK, width), _fitted(indices_BK, width)
    return Chosen(z_BK, indices_BK, z_BK.where(z_BK > 0, float("inf")).min())


def _fitted(values_BM: torch.Tensor, width: int) -> torch.Tensor:
    return _widened(values_BM, max(width, values_BM.shape[1]))[:, :width].contiguous()
