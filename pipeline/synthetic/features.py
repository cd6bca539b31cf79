"""What is known of a world's features one by one: how often they fire, how strongly, and below which other one."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.synthetic.draws import Use, generator
from schemas.synthetic import Firing, Hierarchy, Magnitudes, Spread, World

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]


def probabilities(firing: Firing, features: int) -> Floats:
    """The firing probability of every feature, falling. Shape (F,).

    With `min_probability`, the power law is stretched to run from the largest to the smallest (SynthSAEBench); with
    `l0`, it is scaled, and cut at the largest, so that the sum is `l0`.

    >>> probabilities(Firing(exponent=1.0, max_probability=0.4, min_probability=0.1), 3).round(3).tolist()
    [0.4, 0.175, 0.1]
    >>> float(probabilities(Firing(exponent=1.0, max_probability=0.4, l0=1.0), 3).sum().round(9))
    1.0
    """
    law_F: Floats = np.arange(1, features + 1, dtype=np.float64) ** -firing.exponent
    if firing.l0 is None:
        assert firing.min_probability is not None
        if features == 1:
            return np.array([firing.max_probability])
        share_F = (law_F - law_F[-1]) / (law_F[0] - law_F[-1])
        return np.asarray(firing.min_probability + (firing.max_probability - firing.min_probability) * share_F)
    # Which features are cut grows one by one, so the scale is exact for the first count that fits itself.
    for cut in range(features):
        scale = (firing.l0 - cut * firing.max_probability) / law_F[cut:].sum()
        if scale * law_F[cut] <= firing.max_probability:
            return np.asarray(np.minimum(scale * law_F, firing.max_probability))
    return np.full(features, firing.max_probability)


def parents(hierarchy: Hierarchy | None, features: int) -> Ids:
    """The feature above each, -1 where there is none. Shape (F,).

    >>> parents(Hierarchy(roots=2, branching=2, depth=1), 7).tolist()
    [-1, -1, 0, 0, 1, 1, -1]
    """
    found_F = np.full(features, -1, np.int64)
    if hierarchy is not None:
        below = np.arange(hierarchy.size - hierarchy.roots)
        found_F[hierarchy.roots : hierarchy.size] = below // hierarchy.branching
    return found_F


def compensated(probability_F: Floats, parent_F: Ids, exclusive: bool) -> Floats:
    """How often a feature must fire, given that its parent does, to fire as often as specified in all. Shape (F,).

    p_i / p_parent, and for exclusive children as much again as siblings take away in the mean: times
    1 + sum of the siblings' p / p_parent; at most 1. SynthSAEBench's correction, which is not exact.

    Args:
        probability_F: How often each is to fire.
        parent_F: See `parents`.
        exclusive: Whether at most one child of a parent fires.
    """
    below = np.flatnonzero(parent_F >= 0)
    above = parent_F[below]
    conditional_F = probability_F.copy()
    conditional_F[below] /= probability_F[above]
    if exclusive:
        total_F = np.bincount(above, probability_F[below], minlength=len(parent_F))
        conditional_F[below] *= 1.0 + np.maximum(total_F[above] - probability_F[below], 0.0) / probability_F[above]
    return np.minimum(conditional_F, 1.0)


def magnitudes(section: Magnitudes, features: int, seed: int) -> tuple[Floats, Floats]:
    """Mean and standard deviation of each feature, before what is below zero is cut. Shapes (F,), (F,)."""
    first, last = section.mean if isinstance(section.mean, tuple) else (section.mean, section.mean)
    if isinstance(section.std, Spread):
        std_F = np.abs(section.std.mean + section.std.spread * generator(Use.STD, seed).standard_normal(features))
    else:
        std_F = np.full(features, section.std)
    return np.linspace(first, last, features), std_F


@dataclass(frozen=True, slots=True)
class Features:
    """The law of every feature.

    Attributes:
        probability_F: How often it is to fire.
        conditional_F: How often it fires where its parent does; of those without a parent, how often at all.
        parent_F: The feature above it, or -1.
        mean_F, std_F: Its magnitude.
    """

    probability_F: Floats
    conditional_F: Floats
    parent_F: Ids
    mean_F: Floats
    std_F: Floats

    @property
    def top(self) -> Ids:
        """Features without a parent."""
        return np.flatnonzero(self.parent_F < 0)


@functools.lru_cache(maxsize=2)
def of_world(world: World) -> Features:
    """The features of a world: a pure function of the manifest."""
    probability_F = probabilities(world.firing, world.features)
    parent_F = parents(world.hierarchy, world.features)
    conditional_F = probability_F
    if world.hierarchy is not None and world.hierarchy.compensated:
        conditional_F = compensated(probability_F, parent_F, world.hierarchy.exclusive)
    mean_F, std_F = magnitudes(world.magnitudes, world.features, world.seed)
    return Features(probability_F, conditional_F, parent_F, mean_F, std_F)
