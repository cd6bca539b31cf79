"""Activations whose true features are known: a few of many random directions a token, and noise.

How often a direction is active falls with a power of its rank, as features of a model do; its weight is
exponential. The variance sums to the width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# Mean of an exponential weight's square, by which the variance is known without looking at a sample.
SECOND_MOMENT = 2.0
# Random streams of their own. Plain seeds would not do: numpy's generators of 0, [0] and [0, 0] are one and the same,
# and a dictionary whose rows start from the generator of [seed, 0] would start from the true directions of seed 0.
OF_DIRECTIONS, OF_TOKENS = (71,), (72,)


@dataclass(frozen=True)
class GroundTruth:
    """What activations are made of.

    Args:
        width: D.
        directions: How many true features.
        active: Of a token; one may be drawn twice.
        noise: Standard deviation in each dimension, before scaling.
        exponent: How fast frequencies fall with rank.
        seed: Of the directions.
    """

    width: int
    directions: int = 8192
    active: int = 24
    noise: float = 0.05
    exponent: float = 0.7
    seed: int = 0

    def vectors(self) -> npt.NDArray[np.float32]:
        """The true directions, unit rows. Shape (M, D)."""
        random = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=OF_DIRECTIONS))
        made_MD = random.standard_normal((self.directions, self.width), dtype=np.float32)
        return made_MD / np.linalg.norm(made_MD, axis=1, keepdims=True)

    def frequencies(self) -> npt.NDArray[np.float64]:
        """How often each is drawn; sums to 1. Shape (M,)."""
        made_M = np.arange(1.0, self.directions + 1) ** -self.exponent
        return made_M / made_M.sum()

    def sample(self, batches: int, batch: int, seed: int) -> npt.NDArray[np.float32]:
        """Fresh tokens. Shape (batches, B, D).

        Args:
            batches: How many.
            batch: B.
            seed: Of the tokens.
        """
        random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=OF_TOKENS))
        vectors_MD, frequencies_M = self.vectors(), self.frequencies()
        scale = self._scale(vectors_MD, frequencies_M)
        x_NBD = np.empty((batches, batch, self.width), np.float32)
        for x_BD in x_NBD:
            active_BA = random.choice(self.directions, (batch, self.active), p=frequencies_M)
            weights_BA = random.exponential(size=(batch, self.active)).astype(np.float32)
            x_BD[:] = self.noise * random.standard_normal(x_BD.shape, dtype=np.float32)
            # One drawing after another: all at once, the gathered rows would be `active` times the batch.
            for index_B, weight_B in zip(active_BA.T, weights_BA.T, strict=True):
                x_BD += weight_B[:, None] * vectors_MD[index_B]
            x_BD *= scale
        return x_NBD

    def _scale(self, vectors_MD: npt.NDArray[np.float32], frequencies_M: npt.NDArray[np.float64]) -> np.float32:
        mean_D = frequencies_M @ vectors_MD
        variance = self.active * (SECOND_MOMENT - float(mean_D @ mean_D)) + self.width * self.noise**2
        return np.float32(np.sqrt(self.width / variance))
