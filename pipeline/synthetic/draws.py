"""Random numbers of a synthetic source: what each generator is for is part of its key, so no two of them agree.

Philox counts, so a generator that is made again from its key gives the same numbers in any process.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Use(IntEnum):
    """What random numbers are for."""

    DIRECTIONS = 1
    BIAS = 2
    STD = 3
    LOADINGS = 4
    CODES = 5
    ROWS = 6
    TOY = 7
    TOY_ROWS = 8


class Split(IntEnum):
    """Two streams of rows that share nothing but the world."""

    TRAIN = 0
    HELDOUT = 1


# Rows of one generator: whoever wants one of them makes all of them.
BLOCK_ROWS = 1024


def generator(use: Use, *key: int) -> np.random.Generator:
    """The generator of a key.

    >>> float(generator(Use.ROWS, 0, 1).random()) == float(generator(Use.ROWS, 0, 1).random())
    True
    >>> float(generator(Use.ROWS, 0, 1).random()) == float(generator(Use.ROWS, 0, 2).random())
    False
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([int(use), *key])))
