"""Which learned feature stands for which true one, one to one: as many pairs as the smaller side has rows.

Shapes: A and B rows of the two sides, D width, M neighbours, P pairs, E candidate pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pipeline.recovery.neighbours import Neighbours, either, neighbours, opposites

# Pairs of rows of which a matrix of float64 (2 GiB) is assigned exactly: some minutes.
EXACT_ENTRIES = 2**28
# How much a bid may fall short of the best: what a pair of the auction may cost in |cosine|.
SLACK = 1e-3

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Pairs:
    """Rows of the two sides that are matched, by the first side's; cosines with their signs. (P,) each."""

    first_P: torch.Tensor
    second_P: torch.Tensor
    cosines_P: torch.Tensor


def assign(
    first_AD: torch.Tensor, second_BD: torch.Tensor, near_first: Neighbours, near_second: Neighbours, seed: int = 0
) -> Pairs:
    """The one-to-one matching with the largest sum of |cosine|: exact up to 2^28 = 16,384^2 entries, else near it.

    Args:
        first_AD: Unit rows, float32.
        second_BD: Unit rows, float32.
        near_first: For each row of the first side, rows of the second with the largest |cosine|.
        near_second: The same from the second side.
        seed: Of approximate searches for what is left over.
    """
    if len(first_AD) * len(second_BD) <= EXACT_ENTRIES:
        return assign_exactly(first_AD, second_BD)
    return assign_by_auction(first_AD, second_BD, near_first, near_second, seed)


def assign_exactly(first_AD: torch.Tensor, second_BD: torch.Tensor) -> Pairs:
    """The matching by scipy's linear sum assignment: A B entries of memory, cubic time at worst.

    >>> pairs = assign_exactly(torch.tensor([[1.0, 0.0], [0.8, 0.6]]), torch.tensor([[1.0, 0.0], [-0.6, -0.8]]))
    >>> pairs.second_P.tolist(), [round(cosine, 2) for cosine in pairs.cosines_P.tolist()]
    ([0, 1], [1.0, -0.96])
    """
    if len(first_AD) > len(second_BD):
        return _by_first(*_swapped(assign_exactly(second_BD, first_AD)))
    # Brought in by who needs it: it costs every process 0.3 s.
    from scipy.optimize import linear_sum_assignment

    cost_AB = (first_AD @ second_BD.T).double().abs_().neg_()
    first, second = (torch.from_numpy(side) for side in linear_sum_assignment(cost_AB.cpu().numpy()))
    return _by_first(first, second, _cosines(first_AD, second_BD, first, second))


def assign_by_auction(
    first_AD: torch.Tensor,
    second_BD: torch.Tensor,
    near_first: Neighbours,
    near_second: Neighbours,
    seed: int = 0,
    exact_entries: int = EXACT_ENTRIES,
) -> Pairs:
    """A matching near the best one, over each side's nearest neighbours alone.

    The rows of the smaller side bid for those of the other (Bertsekas 1988). An auction over given candidates ends
    within 10^-3 per row of their best matching; what it leaves over is matched the same way with neighbours among
    themselves, and exactly as soon as that has at most `exact_entries` entries. Rows that nothing resembles end up with
    about the same cosine whatever they are matched to, which is why few candidates are enough: tests hold the sum to
    within 0.5 % of the exact one. Memory grows with A + B; 60,000 x 60,000 rows of width 32 with 8 neighbours took
    10 s.
    """
    if len(first_AD) > len(second_BD):
        swapped = assign_by_auction(second_BD, first_AD, near_second, near_first, seed, exact_entries)
        return _by_first(*_swapped(swapped))
    rows_A, rows_B = torch.arange(len(first_AD)), torch.arange(len(second_BD))
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    while True:
        starts_A, places_E, worth_E = _candidates(near_first, near_second)
        mate_A = torch.from_numpy(_auction(starts_A, places_E, worth_E, len(rows_B)))
        bid_A = mate_A >= 0
        found.append((rows_A[bid_A], rows_B[mate_A[bid_A]]))
        left_B = torch.ones(len(rows_B), dtype=torch.bool)
        left_B[mate_A[bid_A]] = False
        rows_A, rows_B = rows_A[~bid_A], rows_B[left_B]
        rest_AD, rest_BD = first_AD[rows_A], second_BD[rows_B]
        # Nobody bids for what is worth nothing, and no further auction would change that.
        if len(rows_A) * len(rows_B) <= exact_entries or not bid_A.any():
            break
        count = near_first.indices_QM.shape[1]
        near_first = either(neighbours(rest_AD, rest_BD, count, seed), opposites(rest_AD, rest_BD, count, seed))
        near_second = either(neighbours(rest_BD, rest_AD, count, seed), opposites(rest_BD, rest_AD, count, seed))
    if len(rows_A) * len(rows_B) <= exact_entries:
        rest = assign_exactly(rest_AD, rest_BD)
        found.append((rows_A[rest.first_P], rows_B[rest.second_P]))
    else:
        found.append((rows_A, rows_B[: len(rows_A)]))
    first, second = (torch.cat(side) for side in zip(*found, strict=True))
    return _by_first(first, second, _cosines(first_AD, second_BD, first, second))


def _cosines(
    first_AD: torch.Tensor, second_BD: torch.Tensor, first: torch.Tensor, second: torch.Tensor
) -> torch.Tensor:
    parts = zip(torch.split(first, 65_536), torch.split(second, 65_536), strict=True)
    return torch.cat([(first_AD[a] * second_BD[b]).sum(1).cpu() for a, b in parts])


def _swapped(pairs: Pairs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return pairs.second_P, pairs.first_P, pairs.cosines_P


def _by_first(first: torch.Tensor, second: torch.Tensor, cosines: torch.Tensor) -> Pairs:
    order = first.argsort()
    return Pairs(first[order], second[order], cosines[order])


def _candidates(near_first: Neighbours, near_second: Neighbours) -> tuple[Ints, Ints, Floats]:
    """Both sides' neighbours as one sparse matrix of |cosine|: where each first row's begin, second rows, values."""
    sides = (near_first, near_second)
    near_A, near_B = (near.indices_QM.cpu().numpy() for near in sides)
    first = np.concatenate([np.repeat(np.arange(len(near_A)), near_A.shape[1]), near_B.reshape(-1)])
    second = np.concatenate([near_A.reshape(-1), np.repeat(np.arange(len(near_B)), near_B.shape[1])])
    worth = np.concatenate([near.cosines_QM.abs().double().cpu().numpy().reshape(-1) for near in sides])
    _, once = np.unique(first * len(near_B) + second, return_index=True)
    starts_A = np.zeros(len(near_A) + 1, np.int64)
    np.cumsum(np.bincount(first[once], minlength=len(near_A)), out=starts_A[1:])
    return starts_A, second[once], worth[once]


def _auction(starts_A: Ints, places_E: Ints, worth_E: Floats, places: int) -> Ints:
    """What each bidder ends up with; -1 for one that is better off with nothing.

    All who have nothing bid at once: each for what leaves it the most over the price, as much more than the price as
    it has to lose by taking its second choice (or nothing), plus the slack. Prices begin at 0 and only rise, so what
    nobody took has price 0, and the sum is within slack x bidders of the best (Bertsekas 1988, proposition 1).
    """
    price_B = np.zeros(places)
    owner_B = np.full(places, -1)
    active = np.flatnonzero(np.diff(starts_A))
    while len(active):
        begin = starts_A[active]
        degree = starts_A[active + 1] - begin
        offset = np.cumsum(degree) - degree
        edges = np.repeat(begin - offset, degree) + np.arange(degree.sum())
        profit = worth_E[edges] - price_B[places_E[edges]]
        bidder = np.repeat(np.arange(len(active)), degree)
        first = np.maximum.reduceat(profit, offset)
        at_best = np.flatnonzero(profit == first[bidder])
        best = at_best[np.unique(bidder[at_best], return_index=True)[1]]
        # Nothing at all is the least of second choices.
        profit[best] = 0.0
        second = np.maximum(np.maximum.reduceat(profit, offset), 0.0)
        bids = first > 0
        who, place = active[bids], places_E[edges[best[bids]]]
        offer = price_B[place] + (first - second)[bids] + SLACK
        order = np.lexsort((who, -offer, place))
        who, place, offer = who[order], place[order], offer[order]
        taken, highest = np.unique(place, return_index=True)
        outbid = np.ones(len(who), bool)
        outbid[highest] = False
        former = owner_B[taken]
        owner_B[taken], price_B[taken] = who[highest], offer[highest]
        active = np.sort(np.concatenate([former[former >= 0], who[outbid]]))
    mate_A = np.full(len(starts_A) - 1, -1)
    owned = np.flatnonzero(owner_B >= 0)
    mate_A[owner_B[owned]] = owned
    return mate_A
