"""Holding a dictionary against known features."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from pipeline.recovery.search import search_learned, search_true
from pipeline.synthetic.rows import Active
from pipeline.truth import Tally, Truth, recovery, resemblance
from tests.pipeline.recovery.worlds import directions, near


def truth_of(directions_MD: torch.Tensor, represented: list[bool] | None = None) -> Truth:
    count = len(directions_MD)
    return Truth(
        normalize(directions_MD, dim=1),
        torch.ones(count),
        torch.tensor(represented or [True] * count),
        torch.full((count,), -1),
        torch.zeros(count, dtype=torch.int64),
    )


def always(features: int, known: int) -> Tally:
    tally = Tally(features, known)
    tally.fires_F += 1
    return tally


def test_recovery_of_the_truth_itself_in_another_order_is_perfect() -> None:
    directions_MD = torch.randn(40, 12, generator=torch.Generator().manual_seed(1))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    found = recovery(3.0 * directions_MD[order], truth_of(directions_MD), always(40, 40))
    assert found.metrics["mmcs_found"] == pytest.approx(1.0, abs=1e-6)
    assert found.metrics["mmcs_true"] == pytest.approx(1.0, abs=1e-6)
    assert found.metrics["found"] == 1.0
    assert order[found.nearest_M].tolist() == list(range(40))


def test_recovery_both_ways_tells_what_is_missing_from_what_is_invented() -> None:
    half = recovery(torch.eye(4)[:2], truth_of(torch.eye(4)), always(2, 4))
    assert (half.metrics["mmcs_found"], half.metrics["mmcs_true"], half.metrics["found"]) == (0.5, 1.0, 0.5)
    more = recovery(torch.eye(4), truth_of(torch.eye(4)[:2]), always(4, 2))
    assert (more.metrics["mmcs_found"], more.metrics["mmcs_true"], more.metrics["found"]) == (1.0, 0.5, 1.0)


def test_recovery_takes_signs_for_what_they_are() -> None:
    assert recovery(-torch.eye(2)[:1], truth_of(torch.eye(2)[:1]), always(1, 1)).metrics["mmcs_found"] == -1.0


def test_recovery_knows_only_features_that_fired_and_known_ones_that_are_represented() -> None:
    tally = Tally(2, 2)
    tally.fires_F += torch.tensor([0, 7])
    found = recovery(torch.eye(2), truth_of(torch.eye(2), [True, False]), tally)
    assert (found.metrics["mmcs_found"], found.metrics["mmcs_true"], found.metrics["represented"]) == (0.0, 0.0, 1)
    assert found.nearest_M.tolist() == [1, 1]


@pytest.mark.parametrize("none", ["fired", "represented"])
def test_recovery_where_there_is_nothing_to_compare_has_no_mean(none: str) -> None:
    truth = truth_of(torch.eye(2), [False, False] if none == "represented" else None)
    found = recovery(torch.eye(2), truth, Tally(2, 2) if none == "fired" else always(2, 2))
    assert not {"mmcs_found", "mmcs_true", "found"} & found.metrics.keys()
    assert found.nearest_M.tolist() == [-1, -1]


@pytest.mark.parametrize("alive", [0.9, 0.1])
def test_recovery_by_what_was_searched_is_that_of_a_search_among_the_living(alive: float) -> None:
    """Of ten learned features one lives, so that the neighbours of many a known one are all dead; or most live."""
    true_MD = directions(60, 12, 0)
    truth = truth_of(true_MD, [m % 3 > 0 for m in range(60)])
    draws = torch.Generator().manual_seed(1)
    W_dec_FD = 2.0 * torch.cat([near(true_MD, 0.6 + 0.39 * torch.rand(60, generator=draws), seed) for seed in range(3)])
    tally = Tally(180, 60)
    tally.fires_F += torch.rand(180, generator=draws) < alive
    known_RD = true_MD[truth.represented_M]
    both = search_learned(W_dec_FD, known_RD), search_true(W_dec_FD, known_RD)
    whole, found = recovery(W_dec_FD, truth, tally), recovery(W_dec_FD, truth, tally, both)
    dead_RC = tally.fires_F[both[1].near.indices_QM] == 0
    assert bool(dead_RC.all(1).any()) is (alive < 0.5)
    assert bool(dead_RC.any())
    assert torch.equal(found.nearest_M, whole.nearest_M)
    torch.testing.assert_close(found.cosine_M, whole.cosine_M)
    assert found.metrics == pytest.approx(whole.metrics, abs=1e-6)


def test_resemblance_of_rows_that_nobody_learned_is_that_of_living_features() -> None:
    truth = truth_of(directions(50, 12, 0), [m % 5 > 0 for m in range(50)])
    W_dec_FD = 3.0 * directions(80, 12, 1)
    whole = recovery(W_dec_FD, truth, always(80, 50)).metrics
    made = resemblance(W_dec_FD, truth)
    assert made == pytest.approx({name: whole[name] for name in ("mmcs_found", "mmcs_true", "found")}, abs=1e-6)
    assert resemblance(W_dec_FD, truth_of(torch.eye(2, 12), [False, False])) == {}


def test_resemblance_of_very_many_rows_is_that_of_some_of_them() -> None:
    truth, W_dec_FD = truth_of(directions(3_000, 12, 0)), directions(2_000, 12, 1)
    whole, some = resemblance(W_dec_FD, truth), resemblance(W_dec_FD, truth, most=500)
    assert some != whole
    assert some == pytest.approx(whole, abs=0.02)
    product_MF = truth.directions_MD @ W_dec_FD.T
    assert some["mmcs_found"] == pytest.approx(float(product_MF[::6].max(1).values.mean()), abs=1e-6)
    assert some["mmcs_true"] == pytest.approx(float(product_MF[:, ::4].max(0).values.mean()), abs=1e-6)


def test_tally_counts_what_fired_on_both_sides_and_adds_up() -> None:
    active = Active.of(3, np.array([0, 0, 2]), np.array([1, 4, 1]), np.ones(3))
    tally, other = Tally(4, 5), Tally(4, 5)
    tally.add(torch.tensor([[1.0, 0.0], [2.0, 3.0], [0.5, 0.1]]), torch.tensor([[0, 1], [2, 3], [0, 2]]), active)
    assert (tally.rows, tally.fires_F.tolist(), tally.known_fires_M.tolist()) == (3, [2, 0, 2, 1], [0, 2, 0, 0, 1])
    other.merge(tally)
    other.merge(tally)
    assert (other.rows, other.fires_F.tolist(), other.known_fires_M.tolist()) == (6, [4, 0, 4, 2], [0, 4, 0, 0, 2])
