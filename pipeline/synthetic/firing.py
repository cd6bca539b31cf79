"""Which features fire on a row, at a cost that does not grow with the number of features.

A feature that fires with probability p is one whose Poisson process of rate -log(1 - p) has an event. All processes
together are one, and events of it are drawn for features with a larger rate than theirs and thinned (Lewis and Shedler
1979), so that only about as many numbers are drawn as features fire. Doubled events of a feature count once; exact.

Features that fire together share the factors of a Gaussian copula: i fires where f_i . e + sqrt(1 - |f_i|^2) h_i
exceeds the threshold t_i that its probability asks for, with e a row's factors and h_i its own noise. Given e, features
are independent again, and fire with probability Phi((f_i . e - t_i) / sqrt(1 - |f_i|^2)). Loadings come from a
codebook, so that a row has f . e to work out for each code (C) and not for each feature.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pipeline.synthetic.draws import Use, generator
from pipeline.synthetic.features import Floats, Ids
from schemas.synthetic import Correlation

# Vectors of loadings: two features have the same with a chance of 1 in so many.
CODES = 512
# Features of one code whose probabilities differ by less than this share a bound.
RATIO = 1.25
# Bounds hold up to the next of these of f . e, in standard deviations. What is beyond the last one does not occur.
STEPS, REACH = 4, 4
EDGES = np.append(np.linspace(-REACH, REACH, 2 * REACH * STEPS + 1), 9.0)
# Of a feature's variance, factors have at most this.
MOST_SHARED = 0.9


@dataclass(frozen=True, slots=True)
class Loadings:
    """What features know of one another.

    Attributes:
        codebook_CR: Loadings on the factors.
        code_F: Which of them each feature has.
    """

    codebook_CR: Floats
    code_F: Ids

    def shared(self) -> Floats:
        """The part of a feature's variance that the factors have. Shape (C,)."""
        return np.asarray(np.square(self.codebook_CR).sum(1))


def loadings(correlation: Correlation | None, features: int, seed: int) -> Loadings:
    """Loadings N(0, strength^2) on each factor; rows that would exceed the variance are shortened."""
    if correlation is None:
        return Loadings(np.zeros((1, 1)), np.zeros(features, np.int64))
    codes = min(features, CODES)
    codebook_CR = correlation.strength * generator(Use.LOADINGS, seed).standard_normal((codes, correlation.rank))
    shared_C1 = np.square(codebook_CR).sum(1, keepdims=True)
    codebook_CR *= np.sqrt(np.minimum(1.0, MOST_SHARED / shared_C1))
    # Every code has as many features, whose frequencies are mixed.
    code_F = generator(Use.CODES, seed).permutation(features) % codes
    return Loadings(codebook_CR, code_F.astype(np.int64))


class Sampler:
    """Draws the features without a parent that fire, and says how likely any feature is to fire on a row.

    Args:
        conditional_F: Probability of each feature to fire, where its parent does if it has one.
        top_T: Features that need no parent.
        known: Who shares which factors.
    """

    def __init__(self, conditional_F: Floats, top_T: Ids, known: Loadings) -> None:
        self._known = known
        self._deviation_C = np.sqrt(known.shared())
        self._rest_C = np.sqrt(1.0 - known.shared())
        self._threshold_F = -_quantile(conditional_F)
        self._features = len(conditional_F)
        self._group(conditional_F, top_T)

    def _group(self, conditional_F: Floats, top_T: Ids) -> None:
        """Sort the features into groups (G) of one code and like probability, and bound each group's rates."""
        codes = len(self._known.codebook_CR)
        highest = max(float(conditional_F[top_T].max()), 1e-300)
        level_T = np.floor(np.log(highest / conditional_F[top_T]) / np.log(RATIO)).astype(np.int64)
        levels, code_T = int(level_T.max()) + 1, self._known.code_F[top_T]
        cell_T = code_T * levels + level_T
        self._member_T = top_T[np.argsort(cell_T, kind="stable")]
        self._size_CG = np.bincount(cell_T, minlength=codes * levels).reshape(codes, levels)
        self._start_CG = (np.cumsum(self._size_CG) - self._size_CG.ravel()).reshape(codes, levels)
        lowest_CG = np.full(codes * levels, np.inf)
        np.minimum.at(lowest_CG, cell_T, self._threshold_F[top_T])
        # Without factors one edge is enough: f . e is zero.
        self._edges = EDGES if codes > 1 or self._deviation_C[0] > 0 else np.zeros(1)
        edge_CA1 = (self._deviation_C[:, None] * self._edges)[:, :, None]
        distance_CAG = (edge_CA1 - lowest_CG.reshape(codes, 1, levels)) / self._rest_C[:, None, None]
        self._bound_CAG = np.where(self._size_CG[:, None] > 0, _rate(distance_CAG), 0.0)
        self._cumulative_CAG = np.cumsum(self._bound_CAG * self._size_CG[:, None], axis=2)

    def factors(self, random: np.random.Generator, rows: int) -> Floats:
        """What each code's features have in common on a row, f . e. Shape (N, C)."""
        codebook_CR = self._known.codebook_CR
        if not self._deviation_C.any():
            return np.zeros((rows, len(codebook_CR)))
        return random.standard_normal((rows, codebook_CR.shape[1])) @ codebook_CR.T

    def probability(self, common_NC: Floats, row_E: Ids, feature_E: Ids) -> Floats:
        """How likely features are to fire on rows, given the rows' factors. Shape (E,)."""
        return np.asarray(torch.special.ndtr(torch.from_numpy(self._distance(common_NC, row_E, feature_E))).numpy())

    def _distance(self, common_NC: Floats, row_E: Ids, feature_E: Ids) -> Floats:
        code_E = self._known.code_F[feature_E]
        return (common_NC[row_E, code_E] - self._threshold_F[feature_E]) / self._rest_C[code_E]

    def draw(self, random: np.random.Generator, common_NC: Floats) -> tuple[Ids, Ids]:
        """Features without a parent that fire.

        Args:
            random: Where randomness comes from.
            common_NC: See `factors`.

        Returns:
            Rows and features of the entries, sorted by both. Shapes (E,), (E,).
        """
        codes = common_NC.shape[1]
        edge_NC = np.zeros(common_NC.shape, np.int64)
        if len(self._edges) > 1:
            steps_NC = np.ceil((common_NC * (1.0 / self._deviation_C) + REACH) * STEPS)
            edge_NC = np.clip(steps_NC, 0, len(self._edges) - 1).astype(np.int64)
        total_NC = self._cumulative_CAG[np.arange(codes), edge_NC, -1]
        ends = np.cumsum(total_NC)
        # The largest number below each total, because a product with what is below one may round to it.
        at_E = random.random(random.poisson(ends[-1])) * np.nextafter(ends[-1], 0.0)
        row_E, code_E = np.divmod(np.searchsorted(ends, at_E, side="right"), codes)
        bound_edge_E = edge_NC[row_E, code_E]
        cumulative_EG = self._cumulative_CAG[code_E, bound_edge_E]
        # A fresh number for each choice: what is left of one that chose among millions has too few digits.
        chosen_E = random.random(len(row_E)) * np.nextafter(cumulative_EG[:, -1], 0.0)
        group_E = (cumulative_EG <= chosen_E[:, None]).sum(1)
        member_E = (random.random(len(row_E)) * self._size_CG[code_E, group_E]).astype(np.int64)
        feature_E = self._member_T[self._start_CG[code_E, group_E] + member_E]
        rate_E = _rate(self._distance(common_NC, row_E, feature_E))
        kept_E = random.random(len(row_E)) * self._bound_CAG[code_E, bound_edge_E, group_E] < rate_E
        pair_E = np.unique(row_E[kept_E] * self._features + feature_E[kept_E])
        rows, features = np.divmod(pair_E, self._features)
        return rows, features


def _quantile(probability: Floats) -> Floats:
    """The normal distribution's, with float64's precision far into the tail; 1 has none but infinity."""
    return np.asarray(torch.special.ndtri(torch.from_numpy(probability)).numpy())


def _rate(distance: Floats) -> npt.NDArray[np.float64]:
    """-log(1 - Phi(x)): the rate of a process that has an event with probability Phi(x)."""
    return -np.asarray(torch.special.log_ndtr(-torch.from_numpy(np.asarray(distance))).numpy())
