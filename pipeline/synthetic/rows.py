"""Rows of a synthetic source, and which true features are active on each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from pipeline.synthetic.draws import BLOCK_ROWS, Split


@dataclass(frozen=True, slots=True)
class Active:
    """The true code of N rows, compressed by row (CSR): row n has entries [start_N1[n], start_N1[n + 1]).

    Attributes:
        start_N1: Where each row's entries begin, and the end. int64, (N + 1,).
        feature_E: Which features, ascending in a row. int64.
        value_E: How strongly. float32.
    """

    start_N1: npt.NDArray[np.int64]
    feature_E: npt.NDArray[np.int64]
    value_E: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.start_N1) - 1

    @classmethod
    def of(
        cls, rows: int, row_E: npt.NDArray[np.int64], feature_E: npt.NDArray[np.int64], value_E: npt.NDArray[np.float64]
    ) -> Active:
        """The code with these entries, in whatever order they come."""
        order_E = np.lexsort((feature_E, row_E))
        start_N1 = np.zeros(rows + 1, np.int64)
        np.cumsum(np.bincount(row_E, minlength=rows), out=start_N1[1:])
        return cls(start_N1, feature_E[order_E], value_E[order_E].astype(np.float32))

    def rows(self) -> npt.NDArray[np.int64]:
        """The row of every entry. Shape (E,)."""
        return np.repeat(np.arange(len(self)), np.diff(self.start_N1))

    def sliced(self, first: int, end: int) -> Active:
        """Rows [first, end)."""
        low, high = self.start_N1[first], self.start_N1[end]
        return Active(self.start_N1[first : end + 1] - low, self.feature_E[low:high], self.value_E[low:high])

    @classmethod
    def joined(cls, parts: Sequence[Active]) -> Active:
        """All rows of several codes, one behind the other."""
        offsets = np.cumsum([0, *(len(part.feature_E) for part in parts)])
        starts = [part.start_N1[:-1] + offset for part, offset in zip(parts, offsets, strict=False)]
        return cls(
            np.concatenate([*starts, offsets[-1:]]),
            np.concatenate([part.feature_E for part in parts]),
            np.concatenate([part.value_E for part in parts]),
        )


@dataclass(frozen=True, slots=True)
class Block:
    """Some rows: activations (N, D), float32, and what they are made of."""

    x_ND: torch.Tensor
    active: Active


class Source(Protocol):
    """One hook point whose true features are known."""

    def block(self, split: Split, index: int) -> Block:
        """Rows [index * BLOCK_ROWS, (index + 1) * BLOCK_ROWS) of a split: the same bits whenever they are made."""

    def plain(self, active: Active) -> torch.Tensor:
        """Activations without noise of a true code, worked out the plain way, in float64. Shape (N, D)."""

    @property
    def noise(self) -> float:
        """Standard deviation of the noise on every neuron."""


def rows(source: Source, split: Split, first: int, end: int) -> Block:
    """Rows [first, end) of a split."""
    parts = []
    for index in range(first // BLOCK_ROWS, -(-end // BLOCK_ROWS)):
        made, start = source.block(split, index), index * BLOCK_ROWS
        low, high = max(first - start, 0), min(end - start, BLOCK_ROWS)
        parts.append(Block(made.x_ND[low:high], made.active.sliced(low, high)))
    return Block(torch.cat([part.x_ND for part in parts]), Active.joined([part.active for part in parts]))
