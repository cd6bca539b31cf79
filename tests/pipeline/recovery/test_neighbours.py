import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.recovery import neighbours as search
from pipeline.recovery.neighbours import Neighbours, approximate, either, exact, neighbours, opposites, unit
from tests.pipeline.recovery.worlds import directions, near


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**16),
    queries=st.integers(1, 40),
    rows=st.integers(1, 60),
    width=st.integers(2, 20),
    count=st.integers(1, 9),
)
def test_neighbours_of_few_rows_are_those_of_the_whole_product(
    seed: int, queries: int, rows: int, width: int, count: int
) -> None:
    queries_QD, rows_RD = directions(queries, width, seed), directions(rows, width, seed + 1)
    product_QR = queries_QD @ rows_RD.T
    for found, expected_QM in (
        (neighbours(queries_QD, rows_RD, count), product_QR.topk(min(count, rows), 1).values),
        (opposites(queries_QD, rows_RD, count), product_QR.topk(min(count, rows), 1, largest=False).values),
    ):
        torch.testing.assert_close(found.cosines_QM, expected_QM, rtol=0, atol=2e-6)
        torch.testing.assert_close(found.cosines_QM, product_QR.gather(1, found.indices_QM), rtol=0, atol=2e-6)


@settings(deadline=None)
@given(seed=st.integers(0, 2**16), rows=st.integers(1, 60), width=st.integers(2, 20), count=st.integers(1, 9))
def test_either_of_any_rows_is_the_largest_absolute_product(seed: int, rows: int, width: int, count: int) -> None:
    queries_QD, rows_RD = directions(9, width, seed), directions(rows, width, seed + 1)
    found = either(neighbours(queries_QD, rows_RD, count), opposites(queries_QD, rows_RD, count))
    product_QR = queries_QD @ rows_RD.T
    expected_QM = product_QR.abs().topk(min(count, rows), 1).values
    torch.testing.assert_close(found.cosines_QM.abs(), expected_QM, rtol=0, atol=2e-6)
    torch.testing.assert_close(found.cosines_QM, product_QR.gather(1, found.indices_QM), rtol=0, atol=2e-6)
    assert all(len(set(row)) == len(row) for row in found.indices_QM.tolist())


def test_exact_rows_that_all_point_away_are_ranked_nonetheless() -> None:
    query_QD = directions(1, 16, 0)
    rows_RD = near(-query_QD.expand(3_000, 16), torch.linspace(0.99, 0.3, 3_000), 1)
    found = exact(query_QD, rows_RD, 3)
    assert found.indices_QM.tolist() == [[2_999, 2_998, 2_997]]
    assert float(found.cosines_QM[0, 0]) == pytest.approx(-0.3, abs=1e-5)


def test_exact_equal_rows_come_by_index() -> None:
    rows_RD = directions(1, 8, 0).expand(5, 8).contiguous()
    assert exact(rows_RD[:1], rows_RD, 3).indices_QM.tolist() == [[0, 1, 2]]


def test_exact_several_blocks_are_each_queried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "BLOCK", 7)
    rows_RD = directions(20, 8, 0)
    for find in (exact, approximate):
        assert find(rows_RD, rows_RD, 1).indices_QM.squeeze(1).tolist() == list(range(20))


def test_unit_zero_row_stays_zero() -> None:
    assert unit(torch.zeros(1, 4)).tolist() == [[0.0] * 4]


@pytest.mark.parametrize("width", [48, 768])
def test_approximate_clustered_rows_finds_what_exact_does(width: int) -> None:
    """Clusters of 50 rows at 0.64 of each other; the row that a query is near of stands out by cosine 0.9 or 0.7."""
    rows = 6_000
    centres = directions(rows // 50, width, 0).repeat_interleave(50, 0)
    rows_RD = near(centres, torch.full((rows,), 0.8), 1)
    for cosine, seed in ((0.9, 2), (0.7, 3)):
        queries_QD = near(rows_RD, torch.full((rows,), cosine), seed)[::3]
        sure, found = exact(queries_QD, rows_RD, 1), approximate(queries_QD, rows_RD, 1)
        recall = float((sure.indices_QM == found.indices_QM).double().mean())
        assert recall >= 0.99, (cosine, recall)
        same = sure.indices_QM == found.indices_QM
        torch.testing.assert_close(found.cosines_QM[same], sure.cosines_QM[same], rtol=0, atol=2e-6)


def test_approximate_nothing_near_loses_little_of_the_mean() -> None:
    """Where nothing matches, MMCS must not depend on who searched: the best by chance is nearly as good."""
    queries_QD, rows_RD = directions(500, 96, 0), directions(5_000, 96, 1)
    sure, found = exact(queries_QD, rows_RD, 1), approximate(queries_QD, rows_RD, 1)
    loss = float((sure.cosines_QM - found.cosines_QM).mean())
    assert -1e-6 <= loss < 0.02 * float(sure.cosines_QM.mean())


def test_approximate_same_seed_gives_the_same_bits_and_another_one_other_lists() -> None:
    queries_QD, rows_RD = directions(300, 64, 0), directions(3_000, 64, 1)

    def found(seed: int) -> Neighbours:
        return approximate(queries_QD, rows_RD, 8, seed)

    assert torch.equal(found(3).indices_QM, found(3).indices_QM)
    assert torch.equal(found(3).cosines_QM, found(3).cosines_QM)
    assert not torch.equal(found(3).indices_QM, found(4).indices_QM)


def test_neighbours_choice_goes_by_the_cost_of_the_exact_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the approximate search misses tells which one was taken: bits alone cannot tell near rows apart."""
    base = directions(1, 64, 0).expand(2_000, 64)
    rows_RD = near(base, torch.linspace(0.99, 0.9999, 2_000), 1)
    sure, rough = exact(base[:1], rows_RD, 8), approximate(base[:1], rows_RD, 8, seed=5)
    assert not torch.equal(sure.indices_QM, rough.indices_QM)
    cost = 2_000 * 64
    for in_float32, in_half, fast, expected in (
        (cost, 0, False, sure),
        (cost - 1, cost, False, rough),
        (0, cost, True, sure),
        (cost, cost - 1, True, rough),
    ):
        monkeypatch.setattr(search, "EXACT", in_float32)
        monkeypatch.setattr(search, "EXACT_IN_HALF", in_half)
        monkeypatch.setattr(search, "_fast_in_half", lambda rows, fast=fast: fast)
        assert torch.equal(neighbours(base[:1], rows_RD, 8, seed=5).indices_QM, expected.indices_QM)
