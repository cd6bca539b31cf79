"""A world: features fire by their law, and a row is the sum of their directions. O(k d) for a row of k features."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import embedding_bag

from pipeline.synthetic import directions
from pipeline.synthetic.draws import BLOCK_ROWS, Split, Use, generator
from pipeline.synthetic.features import Floats, Ids, of_world
from pipeline.synthetic.firing import Sampler, loadings
from pipeline.synthetic.rows import Active, Block
from schemas.synthetic import World


class WorldSource:
    """Rows of a world.

    Args:
        world: The manifest's section.
        directions_FD: Its true directions.
    """

    def __init__(self, world: World, directions_FD: torch.Tensor) -> None:
        self._world, self._W_FD = world, directions_FD
        self._bias_D = directions.bias(world.width, world.bias, world.seed)
        self._features = of_world(world)
        known = loadings(world.correlation, world.features, world.seed)
        self._sampler = Sampler(self._features.conditional_F, self._features.top, known)

    @property
    def noise(self) -> float:
        """See `Source.noise`."""
        return self._world.noise

    def active(self, split: Split, index: int) -> Active:
        """The true code of a block of rows, without the rows themselves."""
        return self._active(generator(Use.ROWS, self._world.seed, split, index))

    def block(self, split: Split, index: int) -> Block:
        """See `Source.block`."""
        random = generator(Use.ROWS, self._world.seed, split, index)
        active = self._active(random)
        x_ND = embedding_bag(
            torch.from_numpy(active.feature_E),
            self._W_FD,
            torch.from_numpy(active.start_N1[:-1]),
            mode="sum",
            per_sample_weights=torch.from_numpy(active.value_E),
        )
        x_ND += self._bias_D
        if self._world.noise:
            drawn_ND = random.standard_normal(x_ND.shape, dtype=np.float32)
            x_ND += torch.from_numpy(drawn_ND * np.float32(self._world.noise))
        return Block(x_ND, active)

    def plain(self, active: Active) -> torch.Tensor:
        """See `Source.plain`."""
        made_ND = self._bias_D.double().repeat(len(active), 1)
        for row, feature, value in zip(active.rows(), active.feature_E, active.value_E, strict=True):
            made_ND[row] += self._W_FD[int(feature)].double() * float(value)
        return made_ND

    def _active(self, random: np.random.Generator) -> Active:
        """Roots and features of no tree first, then level by level what is below those that fired."""
        common_NC = self._sampler.factors(random, BLOCK_ROWS)
        row_E, feature_E = self._sampler.draw(random, common_NC)
        row_E, feature_E, value_E = self._fired(random, row_E, feature_E)
        levels = [(row_E, feature_E, value_E)]
        hierarchy = self._world.hierarchy
        for level in range(0 if hierarchy is None else hierarchy.depth):
            assert hierarchy is not None
            first = hierarchy.roots * sum(hierarchy.branching**above for above in range(level))
            above_E = (feature_E >= first) & (feature_E < first + hierarchy.roots * hierarchy.branching**level)
            row_E, feature_E, value_E = self._below(
                random, common_NC, row_E[above_E], feature_E[above_E], value_E[above_E]
            )
            levels.append((row_E, feature_E, value_E))
        rows, features, values = (np.concatenate(parts) for parts in zip(*levels, strict=True))
        return Active.of(BLOCK_ROWS, rows, features, values)

    def _fired(self, random: np.random.Generator, row_E: Ids, feature_E: Ids) -> tuple[Ids, Ids, Floats]:
        """With their magnitudes; what has none has not fired."""
        mean_E = self._features.mean_F[feature_E]
        if self._world.magnitudes.distribution == "exponential":
            value_E = mean_E * random.standard_exponential(len(mean_E))
        else:
            value_E = mean_E + self._features.std_F[feature_E] * random.standard_normal(len(mean_E))
        kept_E = value_E > 0.0
        return row_E[kept_E], feature_E[kept_E], value_E[kept_E]

    def _below(
        self, random: np.random.Generator, common_NC: Floats, row_P: Ids, parent_P: Ids, value_P: Floats
    ) -> tuple[Ids, Ids, Floats]:
        """Children of the parents (P) that fired, of those that fire themselves."""
        hierarchy = self._world.hierarchy
        assert hierarchy is not None
        place_X = np.repeat(np.arange(len(parent_P)), hierarchy.branching)
        child_X = hierarchy.roots + hierarchy.branching * parent_P[place_X]
        child_X += np.tile(np.arange(hierarchy.branching), len(parent_P))
        likely_X = self._sampler.probability(common_NC, row_P[place_X], child_X)
        fires_X = np.flatnonzero(random.random(len(child_X)) < likely_X)
        place_E, feature_E, value_E = self._fired(random, place_X[fires_X], child_X[fires_X])
        if hierarchy.exclusive:
            # In random order, the first child of every parent stays.
            order_E = np.lexsort((random.random(len(place_E)), place_E))
            kept_E = order_E[np.flatnonzero(np.diff(place_E[order_E], prepend=-1))]
            place_E, feature_E, value_E = place_E[kept_E], feature_E[kept_E], value_E[kept_E]
        if hierarchy.scaled:
            value_E = value_E * value_P[place_E] / self._features.mean_F[parent_P[place_E]]
        return row_P[place_E], feature_E, value_E
