import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.recovery.assignment import Pairs
from pipeline.recovery.scores import (
    absorption,
    by_fires,
    detection,
    duplicates,
    found,
    mcc,
    mmcs,
    splitting,
    uniqueness,
)


@settings(deadline=None)
@given(seed=st.integers(0, 2**16), tokens=st.integers(1, 30))
def test_detection_any_firings_is_what_vectors_of_0_and_1_give(seed: int, tokens: int) -> None:
    generator = np.random.default_rng(seed)
    learned, true = (generator.random((tokens, 5)) < generator.random(5) for _ in range(2))
    made = detection(*(torch.from_numpy(each.sum(0)) for each in (learned & true, learned, true)), tokens=tokens)
    for pair in range(5):
        hits = int((learned & true)[:, pair].sum())
        wrong, missed = (int((one & ~other)[:, pair].sum()) for one, other in ((learned, true), (true, learned)))
        assert float(made.f1_P[pair]) == pytest.approx(2 * hits / (2 * hits + wrong + missed) if hits else 0.0)
        assert float(made.precision_P[pair]) == pytest.approx(hits / (hits + wrong) if hits else 0.0)
        assert float(made.recall_P[pair]) == pytest.approx(hits / (hits + missed) if hits else 0.0)
        assert float(made.accuracy_P[pair]) == pytest.approx(float((learned == true)[:, pair].mean()))
        constant = len(set(learned[:, pair])) == 1 or len(set(true[:, pair])) == 1
        matthews = 0.0 if constant else float(np.corrcoef(learned[:, pair], true[:, pair])[0, 1])
        assert float(made.matthews_P[pair]) == pytest.approx(matthews, abs=1e-9)


def test_detection_many_tokens_does_not_overflow() -> None:
    count = torch.tensor([2_000_000_000])
    assert float(detection(count, count, count, 4_000_000_000).matthews_P) == pytest.approx(1.0)


def test_mmcs_turned_feature_counts_against() -> None:
    assert mmcs(torch.tensor([1.0, -1.0])) == 0.0


def test_mcc_turned_pair_counts() -> None:
    assert mcc(Pairs(torch.tensor([0]), torch.tensor([0]), torch.tensor([-0.5]))) == 0.5


def test_uniqueness_and_splitting_add_up_to_all_features() -> None:
    true_F = torch.tensor([5, 5, 5, 1, 2])
    assert uniqueness(true_F) == 0.6
    assert splitting(true_F) == 2
    assert uniqueness(true_F[:0]) == 0.0


def test_duplicates_at_the_limit_are_none() -> None:
    assert duplicates(torch.tensor([0.9, 0.91])) == 0.5


def test_absorption_is_a_mean_over_parents_not_tokens() -> None:
    assert absorption(torch.tensor([1, 0]), torch.tensor([1, 999])) == 0.5
    assert absorption(torch.tensor([0]), torch.tensor([0])) == 0.0


def test_by_fires_powers_of_ten_begin_their_own_rows() -> None:
    fires_M = torch.tensor([0, 1, 9, 10, 999, 1000, 10**15])
    rows = by_fires(fires_M, torch.ones(7), torch.ones(7))
    assert [(row["fires_from"], row["fires_below"], row["features"]) for row in rows] == [
        (0, 1, 1),
        (1, 10, 2),
        (10, 100, 1),
        (100, 1000, 1),
        (1000, 10_000, 1),
        (10**15, 10**16, 1),
    ]


def test_found_at_the_limit_counts_whichever_way_round() -> None:
    assert found(torch.tensor([0.9, -0.9, 0.8999, 0.7]), 0.9) == 0.5
