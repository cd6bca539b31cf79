"""Rows of a world: what fires, how often, how strongly, together with what, and at what cost."""

import itertools
import tracemalloc
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import stats

from pipeline.synthetic import directions
from pipeline.synthetic.draws import Split
from pipeline.synthetic.features import of_world
from pipeline.synthetic.firing import loadings
from pipeline.synthetic.rows import rows
from schemas.synthetic import World
from tests.support.synthetic import PRESET, ROWS, codes, dense, source_of, world_tree

Floats = npt.NDArray[np.float64]
BLOCKS = 100
MAGNITUDES = {"mean": [2.0, 1.0], "std": {"mean": 0.4, "spread": 0.4}}
TREES = {"roots": 4, "branching": 3, "depth": 2}


def world_of(**changes: Any) -> World:
    return World.model_validate(world_tree(**changes))


def require_frequencies(count_F: npt.NDArray[np.int64], expected_F: Floats, count: int) -> None:
    """Chi-square over features that fire independently of one another, two-sided, and each one by itself."""
    deviation_F = (count_F - count * expected_F) / np.sqrt(count * expected_F * (1.0 - expected_F))
    assert np.abs(deviation_F).max() < stats.norm.isf(1e-4 / len(expected_F))
    assert 1e-4 < stats.chi2.cdf((deviation_F**2).sum(), len(expected_F)) < 1.0 - 1e-4


def strengths(world: World) -> Floats:
    """The chance of each feature that its magnitude is above zero."""
    features = of_world(world)
    with np.errstate(divide="ignore"):
        return np.asarray(stats.norm.cdf(features.mean_F / features.std_F))


def test_features_fire_as_often_as_specified() -> None:
    world = world_of(magnitudes=MAGNITUDES, features=400)
    active = codes(world, BLOCKS)
    expected_F = of_world(world).probability_F * strengths(world)
    require_frequencies(np.bincount(active.feature_E, minlength=400), expected_F, BLOCKS * ROWS)


def test_correlated_features_fire_as_often_as_specified() -> None:
    # Of one row, correlated counts are no independent draws: each feature is held to its own bound.
    world = world_of(correlation={"rank": 6, "strength": 0.3}, features=400)
    active = codes(world, BLOCKS)
    count_F, expected_F = np.bincount(active.feature_E, minlength=400), of_world(world).probability_F
    count = BLOCKS * ROWS
    deviation_F = (count_F - count * expected_F) / np.sqrt(count * expected_F * (1.0 - expected_F))
    assert np.abs(deviation_F).max() < stats.norm.isf(1e-4 / 400)
    assert 0.8 < deviation_F.std() < 1.25


def test_correlated_features_fire_together_as_their_gaussians_say() -> None:
    world = world_of(correlation={"rank": 3, "strength": 0.5}, features=24)
    fired_NF = dense(codes(world, BLOCKS), 24) > 0
    known = loadings(world.correlation, world.features, world.seed)
    loading_FR = known.codebook_CR[known.code_F]
    correlation_FF = loading_FR @ loading_FR.T
    threshold_F = stats.norm.isf(of_world(world).probability_F)
    seen = []
    for i, j in itertools.combinations(range(24), 2):
        shape = [[1.0, correlation_FF[i, j]], [correlation_FF[i, j], 1.0]]
        both = stats.multivariate_normal(cov=shape).cdf([-threshold_F[i], -threshold_F[j]])
        count = int((fired_NF[:, i] & fired_NF[:, j]).sum())
        seen.append((count - len(fired_NF) * both) / np.sqrt(len(fired_NF) * both * (1.0 - both)))
    assert np.abs(seen).max() < stats.norm.isf(1e-4 / len(seen))
    assert np.abs(correlation_FF - np.diag(np.diag(correlation_FF))).max() > 0.4, "a world without correlation"


def marginals(world: World) -> Floats:
    """How often each feature fires in a world without correlation: brute force over which siblings do."""
    assert world.hierarchy is not None
    features, chance_F = of_world(world), strengths(world)
    found_F = features.conditional_F * chance_F
    for parent in range(len(found_F)):
        children = np.flatnonzero(features.parent_F == parent)
        own = features.conditional_F[children] * chance_F[children]
        for place, child in enumerate(children):
            others = np.delete(own, place)
            share = 0.0
            for fires in itertools.product((0, 1), repeat=len(others)):
                likely = np.prod(np.where(fires, others, 1.0 - others))
                share += likely / (1 + sum(fires)) if world.hierarchy.exclusive else likely
            found_F[child] = found_F[parent] * own[place] * share
    return found_F


@pytest.mark.parametrize("exclusive", [True, False])
def test_features_in_trees_fire_as_often_as_their_parents_and_siblings_let_them(exclusive: bool) -> None:
    world = world_of(hierarchy=TREES | {"exclusive": exclusive}, magnitudes=MAGNITUDES)
    count_F = np.bincount(codes(world, BLOCKS).feature_E, minlength=60)
    expected_F, count = marginals(world), BLOCKS * ROWS
    deviation_F = (count_F - count * expected_F) / np.sqrt(count * expected_F * (1.0 - expected_F))
    assert np.abs(deviation_F).max() < stats.norm.isf(1e-4 / 60)
    # What is compensated fires about as often as it would alone.
    wanted_F = of_world(world).probability_F
    assert np.abs(expected_F / wanted_F - 1.0).mean() < (0.2 if exclusive else 0.1)


@pytest.mark.parametrize("correlation", [None, {"rank": 2, "strength": 0.4}])
def test_children_fire_only_below_their_parent_and_one_of_them_at_a_time(correlation: dict[str, Any] | None) -> None:
    world = world_of(hierarchy=TREES, magnitudes=MAGNITUDES, correlation=correlation)
    fired_NF = dense(codes(world, 20), 60) > 0
    parent_F = of_world(world).parent_F
    for parent in range(16):
        below = fired_NF[:, parent_F == parent]
        assert below.any(), "a world without children"
        assert not below[~fired_NF[:, parent]].any()
        assert below.sum(1).max() == 1


def test_siblings_that_do_not_exclude_one_another_fire_together() -> None:
    world = world_of(hierarchy=TREES | {"exclusive": False})
    fired_NF = dense(codes(world, 20), 60) > 0
    assert max(fired_NF[:, of_world(world).parent_F == parent].sum(1).max() for parent in range(4)) > 1


def test_magnitudes_have_their_mean_and_deviation() -> None:
    world = world_of(magnitudes={"mean": [3.0, 2.0], "std": 0.25}, features=20)
    active = codes(world, BLOCKS)
    for feature, mean in enumerate(np.linspace(3.0, 2.0, 20)):
        values = active.value_E[active.feature_E == feature]
        assert values.mean() == pytest.approx(mean, abs=5 * 0.25 / np.sqrt(len(values)))
        assert values.std() == pytest.approx(0.25, rel=5 / np.sqrt(2 * len(values)))


def test_exponential_magnitudes_are_exponential() -> None:
    world = world_of(magnitudes={"distribution": "exponential", "mean": 2.0})
    values = codes(world, 20).value_E
    assert stats.kstest(values, stats.expon(scale=2.0).cdf).pvalue > 1e-3


@pytest.mark.parametrize("scaled", [True, False])
def test_children_are_scaled_by_their_parents(scaled: bool) -> None:
    world = world_of(hierarchy=TREES | {"scaled": scaled}, magnitudes={"mean": 2.0, "std": 0.3})
    z_NF = dense(codes(world, BLOCKS), 60)
    parent_F, mean_F = of_world(world).parent_F, of_world(world).mean_F
    ratios = []
    for child in range(4, 16):
        both = z_NF[z_NF[:, child] > 0]
        parent = both[:, parent_F[child]] / mean_F[parent_F[child]]
        ratios.append(np.corrcoef(parent, both[:, child])[0, 1])
        if scaled:
            assert (both[:, child] / parent).std() == pytest.approx(0.3, rel=0.1)
    assert np.mean(ratios) == pytest.approx(0.69 if scaled else 0.0, abs=0.05)


def test_rows_are_the_sum_of_their_directions_and_the_bias() -> None:
    world = world_of(hierarchy=TREES, magnitudes=MAGNITUDES, bias=0.5)
    source = source_of(world)
    made = source.block(Split.TRAIN, 3)
    W_FD = directions.random_directions(60, 12, 0)
    bias_D = directions.bias(12, 0.5, 0)
    assert float(bias_D.norm()) == pytest.approx(0.5)
    expected_ND = torch.from_numpy(dense(made.active, 60)) @ W_FD + bias_D
    torch.testing.assert_close(made.x_ND, expected_ND)
    torch.testing.assert_close(source.plain(made.active).float(), expected_ND)


def test_noise_is_added_to_every_neuron() -> None:
    plain, noisy = source_of(world_of()).block(Split.TRAIN, 0), source_of(world_of(noise=0.3)).block(Split.TRAIN, 0)
    noise_ND = (noisy.x_ND - plain.x_ND).numpy()
    assert stats.kstest(noise_ND.ravel() / 0.3, stats.norm.cdf).pvalue > 1e-3


@pytest.mark.parametrize(
    "changes", [{}, {"hierarchy": TREES, "correlation": {"rank": 2, "strength": 0.3}, "noise": 0.1}]
)
def test_rows_do_not_depend_on_which_others_are_made(changes: dict[str, Any]) -> None:
    world = world_of(**changes)
    whole = rows(source_of(world), Split.TRAIN, 0, 5000)
    for first, end in ((0, 1), (1023, 1025), (3000, 5000)):
        part = rows(source_of(world), Split.TRAIN, first, end)
        assert torch.equal(part.x_ND, whole.x_ND[first:end])
        assert part.active.feature_E.tolist() == whole.active.sliced(first, end).feature_E.tolist()
        assert part.active.start_N1.tolist() == whole.active.sliced(first, end).start_N1.tolist()


def test_rows_of_splits_seeds_and_blocks_differ() -> None:
    made = set()
    for seed, split, index in itertools.product((0, 1), Split, (0, 1)):
        source = source_of(world_of(seed=seed, bias=0.0))
        block, code = source.block(split, index), source.active(split, index)
        assert block.active.feature_E.tolist() == code.feature_E.tolist()
        made.add((tuple(code.start_N1.tolist()), tuple(code.feature_E.tolist())))
    assert len(made) == 8


def test_rows_of_the_preset_have_the_published_number_of_features() -> None:
    world = World.model_validate({"kind": "world", "preset": PRESET, "rows": 1})
    active = codes(world, 4)
    # "~34 active features"; correlated, so rows are spread widely.
    assert len(active.feature_E) / len(active) == pytest.approx(34.0, abs=1.0)


@pytest.mark.parametrize("correlation", [None, {"rank": 16, "strength": 0.1}])
def test_rows_of_a_million_features_take_no_matrix_of_rows_by_features(correlation: dict[str, Any] | None) -> None:
    firing = {"exponent": 1.0, "max_probability": 0.1, "l0": 30.0}
    world = world_of(features=2**20, width=1, firing=firing, correlation=correlation)
    source = source_of(world)
    tracemalloc.start()
    try:
        active = source.active(Split.TRAIN, 0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(active.feature_E) / ROWS == pytest.approx(30.0, abs=2.0)
    # One bit for each row and feature would be 128 MiB.
    assert peak < 96 * 2**20
