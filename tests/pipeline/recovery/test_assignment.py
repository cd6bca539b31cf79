import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.recovery import assignment
from pipeline.recovery.assignment import Pairs, assign, assign_by_auction, assign_exactly
from pipeline.recovery.neighbours import Neighbours, either, neighbours, opposites
from tests.pipeline.recovery.worlds import directions, near


def candidates(first_AD: torch.Tensor, second_BD: torch.Tensor, count: int = 8) -> tuple[Neighbours, Neighbours]:
    """Nearest rows by |cosine|, both ways."""
    return (
        either(neighbours(first_AD, second_BD, count), opposites(first_AD, second_BD, count)),
        either(neighbours(second_BD, first_AD, count), opposites(second_BD, first_AD, count)),
    )


def total(pairs: Pairs) -> float:
    return float(pairs.cosines_P.double().abs().sum())


def check_one_to_one(pairs: Pairs, first_AD: torch.Tensor, second_BD: torch.Tensor) -> None:
    smaller = min(len(first_AD), len(second_BD))
    assert len(pairs.first_P) == len(set(pairs.first_P.tolist())) == len(set(pairs.second_P.tolist())) == smaller
    assert pairs.first_P.tolist() == sorted(pairs.first_P.tolist())
    expected_P = (first_AD[pairs.first_P] * second_BD[pairs.second_P]).sum(1)
    torch.testing.assert_close(pairs.cosines_P, expected_P, rtol=0, atol=2e-6)


@settings(deadline=None)
@given(seed=st.integers(0, 2**16), first=st.integers(1, 5), second=st.integers(1, 5))
def test_assign_exactly_few_rows_is_the_best_of_all_matchings(seed: int, first: int, second: int) -> None:
    first_AD, second_BD = directions(first, 3, seed), directions(second, 3, seed + 1)
    pairs = assign_exactly(first_AD, second_BD)
    check_one_to_one(pairs, first_AD, second_BD)
    product = (first_AD @ second_BD.T).abs().double()
    product = product if first <= second else product.T
    best = max(
        sum(float(product[row, place]) for row, place in enumerate(places))
        for places in itertools.permutations(range(product.shape[1]), len(product))
    )
    assert total(pairs) == pytest.approx(best, abs=1e-6)


def learned_from(true_MD: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """What training leaves: matches of all qualities and either sign, splits, and directions of its own."""
    true_count = len(true_MD)
    generator = torch.Generator().manual_seed(seed)
    which_F = torch.cat(
        [
            torch.arange(min(count, true_count)),
            torch.randint(true_count, (max(0, count - true_count),), generator=generator),
        ]
    )
    cosines_F = torch.rand(count, generator=generator)
    signs_F = torch.where(torch.rand(count, generator=generator) < 0.1, -1.0, 1.0)
    learned_FD = signs_F[:, None] * near(true_MD[which_F], cosines_F, seed + 1)
    return learned_FD[torch.randperm(count, generator=generator)]


@pytest.mark.parametrize(("learned", "true"), [(1_500, 1_500), (700, 2_000), (2_000, 700)])
@pytest.mark.parametrize("width", [32, 256])
def test_assign_by_auction_trained_like_rows_loses_at_most_half_a_percent(learned: int, true: int, width: int) -> None:
    true_MD = directions(true, width, 0)
    learned_FD = learned_from(true_MD, learned, 1)
    sure = assign_exactly(learned_FD, true_MD)
    # Nothing that is left over may be handed to the exact matching but the last few.
    found = assign_by_auction(learned_FD, true_MD, *candidates(learned_FD, true_MD), exact_entries=100)
    check_one_to_one(found, learned_FD, true_MD)
    assert 0.995 * total(sure) <= total(found) <= total(sure) * (1 + 1e-6)


def test_assign_by_auction_unrelated_rows_loses_at_most_half_a_percent() -> None:
    first_AD, second_BD = directions(1_200, 48, 0), directions(1_200, 48, 1)
    found = assign_by_auction(first_AD, second_BD, *candidates(first_AD, second_BD), exact_entries=100)
    check_one_to_one(found, first_AD, second_BD)
    assert total(found) >= 0.995 * total(assign_exactly(first_AD, second_BD))


def test_assign_by_auction_second_choices_are_taken_where_the_sum_is_larger() -> None:
    """Taking the best pair first, 0.90, leaves 0; the best matching has 0.85 + 0.80."""
    near_first = Neighbours(torch.tensor([[0, 1], [0, 1]]), torch.tensor([[0.9, 0.85], [0.8, 0.0]]))
    near_second = Neighbours(torch.tensor([[0, 1], [0, 1]]), torch.tensor([[0.9, 0.8], [0.85, 0.0]]))
    rows = torch.eye(2)
    pairs = assign_by_auction(rows, rows, near_first, near_second, exact_entries=0)
    assert pairs.second_P.tolist() == [1, 0]


def test_assign_by_auction_candidates_of_either_side_are_bid_for() -> None:
    """All of the first side want place 0; that 1 and 2 go with rows 2 and 1 is in the second side's list alone."""
    near_first = Neighbours(torch.tensor([[0], [0], [0]]), torch.tensor([[0.9], [0.8], [0.7]]))
    near_second = Neighbours(torch.tensor([[0], [2], [1]]), torch.tensor([[0.9], [0.6], [0.6]]))
    pairs = assign_by_auction(torch.eye(3), torch.eye(3), near_first, near_second, exact_entries=0)
    assert pairs.second_P.tolist() == [0, 2, 1]


def test_assign_by_auction_rows_of_zeros_are_matched_to_something() -> None:
    zeros = torch.zeros(3, 4)
    pairs = assign_by_auction(zeros, zeros, *candidates(zeros, zeros, 2), exact_entries=0)
    check_one_to_one(pairs, zeros, zeros)


def test_assign_choice_goes_by_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates that are wrong tell which way was taken."""
    first_AD = torch.eye(2)
    wrong = Neighbours(torch.tensor([[1], [0]]), torch.tensor([[1.0], [1.0]]))
    monkeypatch.setattr(assignment, "EXACT_ENTRIES", 4)
    assert assign(first_AD, first_AD, wrong, wrong).second_P.tolist() == [0, 1]
    monkeypatch.setattr(assignment, "EXACT_ENTRIES", 3)
    assert assign(first_AD, first_AD, wrong, wrong).second_P.tolist() == [1, 0]
