"""The law of a world's features."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.synthetic.features import compensated, magnitudes, of_world, parents, probabilities
from schemas.synthetic import Firing, Hierarchy, Magnitudes, Spread, World
from tests.support.synthetic import PRESET, world_tree


@given(
    features=st.integers(2, 3000),
    exponent=st.floats(0.05, 4.0),
    limits=st.tuples(st.floats(1e-6, 0.99), st.floats(1e-6, 0.99)).map(sorted),
)
def test_probabilities_between_limits_fall_from_one_to_the_other(
    features: int, exponent: float, limits: list[float]
) -> None:
    low, high = limits
    found_F = probabilities(Firing(exponent=exponent, max_probability=high, min_probability=low), features)
    assert found_F[0] == pytest.approx(high)
    assert found_F[-1] == pytest.approx(low)
    assert (np.diff(found_F) <= 0).all()


@given(features=st.integers(1, 2000), exponent=st.floats(0.05, 3.0), share=st.floats(0.001, 1.0))
def test_probabilities_of_a_mean_l0_add_up_to_it_and_follow_the_law(
    features: int, exponent: float, share: float
) -> None:
    l0 = share * 0.4 * features
    found_F = probabilities(Firing(exponent=exponent, max_probability=0.4, l0=l0), features)
    assert found_F.sum() == pytest.approx(l0, rel=1e-9)
    assert found_F.max() <= 0.4 + 1e-12
    below = np.flatnonzero(found_F < 0.4 - 1e-9)
    if len(below):
        law_F = (below + 1.0) ** -exponent
        np.testing.assert_allclose(found_F[below] / law_F, found_F[below[0]] / law_F[0], rtol=1e-9)


def test_parents_are_numbered_level_by_level() -> None:
    found_F = parents(Hierarchy(roots=2, branching=3, depth=2), 30)
    assert found_F[:2].tolist() == [-1, -1]
    assert found_F[2:8].tolist() == [0, 0, 0, 1, 1, 1]
    assert found_F[8:26].tolist() == [parent for parent in range(2, 8) for _ in range(3)]
    assert found_F[26:].tolist() == [-1] * 4


def test_compensation_undoes_what_parents_and_siblings_take() -> None:
    probability_F = np.array([0.4, 0.1, 0.06, 0.2])
    parent_F = np.array([-1, 0, 0, -1])
    alone_F = compensated(probability_F, parent_F, exclusive=False)
    np.testing.assert_allclose(alone_F, [0.4, 0.25, 0.15, 0.2])
    found_F = compensated(probability_F, parent_F, exclusive=True)
    np.testing.assert_allclose(found_F, [0.4, 0.25 * (1 + 0.15), 0.15 * (1 + 0.25), 0.2])
    assert compensated(np.array([0.1, 0.3]), np.array([-1, 0]), exclusive=False)[1] == 1.0


def test_magnitudes_run_from_the_first_to_the_last_and_spread_as_a_folded_normal() -> None:
    mean_F, std_F = magnitudes(Magnitudes(mean=(5.0, 4.0), std=Spread(mean=0.5, spread=0.5)), 20_001, seed=1)
    assert (mean_F[0], mean_F[10_000], mean_F[-1]) == (5.0, 4.5, 4.0)
    # The mean of |N(m, m^2)| is m (sqrt(2 / pi) e^(-1/2) + erf(1 / sqrt 2)).
    assert std_F.mean() == pytest.approx(0.5 * 1.16663, abs=0.01)
    assert std_F.min() >= 0.0
    _, constant_F = magnitudes(Magnitudes(std=0.25), 10, seed=1)
    assert set(constant_F.tolist()) == {0.25}


def test_features_of_the_preset_are_those_of_the_published_benchmark() -> None:
    features = of_world(World.model_validate({"kind": "world", "preset": PRESET, "rows": 1}))
    assert (len(features.probability_F), int((features.parent_F >= 0).sum())) == (16_384, 128 * (4 + 16 + 64))
    assert (features.probability_F[0], features.probability_F[-1]) == (pytest.approx(0.4), pytest.approx(5e-4))
    assert (features.mean_F[0], features.mean_F[-1]) == (5.0, 4.0)


def test_features_of_a_world_that_is_not_compensated_fire_as_often_below_a_parent_as_they_are_given() -> None:
    hierarchy = {"roots": 4, "branching": 2, "depth": 1, "compensated": False}
    features = of_world(World.model_validate(world_tree(hierarchy=hierarchy)))
    np.testing.assert_array_equal(features.conditional_F, features.probability_F)
