"""What a harvest's store looks like: which arrays, in which types, and how a row is hashed.

Shared by the writer and the reader, so that neither can drift from the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict

from cluster.storage.zarr_store import ArraySpec
from pipeline.activations.order import Geometry, choose_geometry
from schemas.layouts import POSITION, ROW, TOKEN, array_name, norm_name
from schemas.manifest import Harvest

# Zarr has no bfloat16: its bits lie in uint16, and an attribute says so.
_STORED = {"float32": "float32", "float16": "float16", "bfloat16": "uint16"}
_TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_FILL: dict[str, float | int] = {"float32": float("nan"), "float16": float("nan"), "bfloat16": 0x7FC0}
FILL_INDEX = -1

_HASH_SEED = 0x6B696C6F62617369


class StoreLayout(BaseModel):
    """Everything that a reader must know of a store, beside the bytes themselves."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rows: int
    unit_rows: int
    chunk_rows: int
    seed: int
    dtype: str
    widths: dict[str, int]

    @property
    def geometry(self) -> Geometry:
        """The cut into units and slabs."""
        return Geometry(self.rows, self.unit_rows, self.chunk_rows)

    def arrays(self) -> dict[str, ArraySpec]:
        """Every array of the group, by name."""
        cut = self.geometry

        def spec(tail: tuple[int, ...], dtype: str, fill: float | int, attributes: Mapping[str, Any]) -> ArraySpec:
            return ArraySpec(cut.units, cut.unit_rows, cut.chunk_rows, tail, dtype, fill, attributes)

        arrays = {
            ROW: spec((), "int64", FILL_INDEX, {"about": "global row id in corpus order; -1 where nothing is"}),
            TOKEN: spec((), "int32", FILL_INDEX, {"about": "token id"}),
            POSITION: spec((), "int32", FILL_INDEX, {"about": "position in the sequence"}),
        }
        for hook_point, width in self.widths.items():
            logical = {"hook_point": hook_point, "logical_dtype": self.dtype}
            name = array_name(hook_point)
            arrays[name] = spec((width,), _STORED[self.dtype], _FILL[self.dtype], logical)
            arrays[norm_name(hook_point)] = spec(
                (), "float32", float("nan"), {"about": "L2 norm of the row as stored", "hook_point": hook_point}
            )
        return arrays

    def attributes(self) -> dict[str, Any]:
        """The group's attributes."""
        return {"kilobasis": self.model_dump(mode="json")}

    def row_bytes(self, hook_point: str) -> int:
        """Bytes of one stored row."""
        return self.widths[hook_point] * _TORCH[self.dtype].itemsize


def choose_layout(
    rows: int,
    widths: Mapping[str, int],
    dtype: str,
    seed: int,
    loader_memory: int,
    unit_rows: int | None,
    chunk_rows: int | None,
) -> StoreLayout:
    """The store for so many rows.

    Args:
        rows: Rows of every hook point.
        widths: Their widths.
        dtype: Type of what is stored.
        seed: Of the permutations.
        loader_memory: See `choose_geometry`, like the two behind it.
        unit_rows: Rows of a unit, or None.
        chunk_rows: Rows of a chunk, or None.

    Raises:
        ManifestError: slabs that fit the loader are not possible.
    """
    row_bytes = max(widths.values()) * _TORCH[dtype].itemsize
    cut = choose_geometry(rows, row_bytes, loader_memory, unit_rows, chunk_rows)
    return StoreLayout(
        rows=rows, unit_rows=cut.unit_rows, chunk_rows=cut.chunk_rows, seed=seed, dtype=dtype, widths=dict(widths)
    )


def planned_layout(section: Harvest, widths: Mapping[str, int], train_rows: int) -> StoreLayout:
    """The store that a manifest's harvest will make, as far as the number of rows is known.

    Raises:
        ManifestError: see `choose_layout`.
    """
    rows = min(train_rows, section.tokens or train_rows)
    return choose_layout(
        rows, widths, section.dtype, section.seed, section.loader_memory, section.unit_rows, section.chunk_rows
    )


def stored(x_ND: torch.Tensor, dtype: str) -> npt.NDArray[Any]:
    """Rows as they lie in the store. Shape (N, D)."""
    cast = x_ND.to(_TORCH[dtype])
    return cast.view(torch.uint16).numpy() if dtype == "bfloat16" else cast.numpy()


def restored(block: npt.NDArray[Any], dtype: str) -> torch.Tensor:
    """Stored rows as a tensor of their logical type, without a copy where numpy allows it. Shape (N, D)."""
    tensor = torch.from_numpy(np.ascontiguousarray(block))
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


def row_hashes(
    rows: npt.NDArray[np.int64],
    tokens: npt.NDArray[np.int32],
    positions: npt.NDArray[np.int32],
    norms: npt.NDArray[np.float32],
    block: npt.NDArray[Any],
) -> npt.NDArray[np.uint64]:
    """A 64-bit hash of everything that is stored of each row. Shape (N,).

    Multilinear hashing over the row's 64-bit words with fixed random odd multipliers, then the finalizer
    of splitmix64. The sum over rows (modulo 2^64) does not depend on their order, so it proves that a
    shuffle lost, doubled and changed nothing (up to a chance of about 2^-64).
    """
    width = block.shape[1] * block.itemsize
    padded = np.zeros((len(block), -(-width // 8) * 8), np.uint8)
    padded[:, :width] = np.ascontiguousarray(block).view(np.uint8).reshape(len(block), width)
    words = padded.view(np.uint64)
    generator = np.random.Generator(np.random.Philox(_HASH_SEED))
    factors = generator.integers(0, 2**64, words.shape[1] + 3, dtype=np.uint64) | np.uint64(1)
    beside = tokens.view(np.uint32).astype(np.uint64) << np.uint64(32) | positions.view(np.uint32)
    mixed = words @ factors[3:] + rows.view(np.uint64) * factors[0]
    mixed += beside * factors[1] + norms.view(np.uint32).astype(np.uint64) * factors[2]
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(mixed ^ (mixed >> np.uint64(31)), np.uint64)


def chunk_sums(hashes: npt.NDArray[np.uint64], counts: npt.NDArray[np.int64]) -> list[int]:
    """Sums of a unit's row hashes, in stored order, over each of its chunks."""
    ends = np.cumsum(counts)
    return [hash_sum(hashes[end - count : end]) for end, count in zip(ends, counts, strict=True)]


def hash_sum(hashes: npt.NDArray[np.uint64]) -> int:
    """Sum modulo 2^64."""
    return int(hashes.sum(dtype=np.uint64))
