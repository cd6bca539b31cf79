"""The shuffle, as arithmetic. The store is written once and read once; no pass in between.

A unit is `unit_rows` consecutive rows of the corpus and one shard of the store. Its rows are permuted
when they are written, so that each of its `slabs` inner chunks is a uniform random sample of the unit.
Slab j is chunk j of every unit: a stratified random sample of the whole corpus. The trainer permutes a
slab in memory and streams slab after slab.

Every permutation here is a pure function of seeds and indices (Philox, which is counter-based), so any
worker, any rank and any resumed process computes the same order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from schemas.errors import ManifestError

MIB = 2**20
TARGET_SLABS = 8
TARGET_UNITS = 4

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Geometry:
    """How `rows` rows are cut into units (shards) and slabs (inner chunks).

    Every unit but the last is full; the last one's rows are dealt evenly over its chunks, whose ends hold
    the fill value, so that every slab keeps its share of every unit.
    """

    rows: int
    unit_rows: int
    chunk_rows: int

    @property
    def units(self) -> int:
        """Number of units."""
        return -(-self.rows // self.unit_rows)

    @property
    def slabs(self) -> int:
        """Number of slabs."""
        return self.unit_rows // self.chunk_rows

    def span(self, unit: int) -> tuple[int, int]:
        """Rows [first, end) of a unit."""
        return unit * self.unit_rows, min((unit + 1) * self.unit_rows, self.rows)

    def chunk_counts(self, unit: int) -> Indices:
        """Rows in each of a unit's chunks. Shape (slabs,)."""
        first, end = self.span(unit)
        share, extra = divmod(end - first, self.slabs)
        return share + (np.arange(self.slabs) < extra).astype(np.int64)

    def slab_count(self, slab: int) -> int:
        """Rows in a slab."""
        last = int(self.chunk_counts(self.units - 1)[slab])
        return (self.units - 1) * self.chunk_rows + last

    def shard_positions(self, unit: int) -> Indices:
        """Where in the shard the unit's permuted rows go: the front of each chunk. Shape (rows of the unit,)."""
        counts = self.chunk_counts(unit)
        return np.concatenate([slab * self.chunk_rows + np.arange(count) for slab, count in enumerate(counts)])


def choose_geometry(
    rows: int,
    row_bytes: int,
    loader_memory: int,
    unit_rows: int | None = None,
    chunk_rows: int | None = None,
) -> Geometry:
    """Cut `rows` rows so that two slabs fit the loader and an inner chunk is at least 1 MiB.

    Args:
        rows: Rows of the store.
        row_bytes: Bytes of one row of the widest hook point.
        loader_memory: Bytes that two slabs may take.
        unit_rows: Fixes the unit; chosen if None.
        chunk_rows: Fixes the chunk; chosen if None.

    Raises:
        ManifestError: the fixed values leave slabs that are too large for the loader.
    """
    if rows < 1:
        raise ManifestError(
            "the corpus has no rows to harvest", "use more text, or lower corpus.heldout or corpus.min_tokens"
        )
    fits = loader_memory // (2 * row_bytes)
    if fits < 1:
        raise ManifestError(
            f"harvest: two rows of {row_bytes} bytes exceed loader_memory {loader_memory}",
            f"raise harvest.loader_memory to at least {2 * row_bytes}",
        )
    needed = -(-rows // fits)
    if unit_rows is None:
        slabs = max(needed, TARGET_SLABS)
        # Small corpora get smaller chunks: a store of one shard would shuffle and resume badly.
        smallest = max(1, -(-rows // (TARGET_UNITS * slabs)))
        chunk = chunk_rows or min(-(-MIB // row_bytes), smallest)
        units = max(1, rows // (chunk * slabs))
        unit_rows = chunk * slabs if chunk_rows else -(-rows // (units * slabs)) * slabs
        chunk_rows = chunk_rows or unit_rows // slabs
    elif chunk_rows is None:
        slabs = min(max(needed, TARGET_SLABS), unit_rows)
        while unit_rows % slabs:
            slabs += 1
        chunk_rows = unit_rows // slabs
    geometry = Geometry(rows, unit_rows, chunk_rows)
    if geometry.slabs < needed:
        slab_bytes = -(-rows // geometry.slabs) * row_bytes
        raise ManifestError(
            f"harvest: {geometry.slabs} slabs of {slab_bytes} bytes each; two of them exceed "
            f"loader_memory {loader_memory}",
            f"raise harvest.unit_rows to {needed * geometry.chunk_rows}, or harvest.loader_memory to {2 * slab_bytes}",
        )
    return geometry


def permutation(count: int, *key: int) -> Indices:
    """A uniform random permutation of `range(count)` that depends on nothing but the key.

    The same key always gives the same order: numpy keeps Philox's stream and `Generator.permutation`
    stable within a pinned version, and a test holds the values.
    """
    seed = np.random.SeedSequence(list(key))
    return np.random.Generator(np.random.Philox(seed)).permutation(count).astype(np.int64)


# The first key says which permutation it is, so that a unit and a slab of the same number differ.
_UNIT, _SLABS, _SLAB = 1, 2, 3


def unit_order(seed: int, unit: int, count: int) -> Indices:
    """Order in which a unit's rows are written: position p holds row `first + order[p]`."""
    return permutation(count, _UNIT, seed, unit)


def epoch_slabs(seed: int, epoch: int, slabs: int) -> Indices:
    """Order in which an epoch reads the slabs."""
    return permutation(slabs, _SLABS, seed, epoch)


def slab_order(seed: int, epoch: int, slab: int, count: int) -> Indices:
    """Order in which an epoch streams the rows of a slab."""
    return permutation(count, _SLAB, seed, epoch, slab)
