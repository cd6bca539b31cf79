"""Writes one unit: permutes its rows and creates exactly one shard in every array of the store."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cluster.storage.create import create
from cluster.storage.objects import read_checked
from cluster.storage.path import StoragePath
from cluster.storage.zarr_store import ArraySpec, decode_shard, encode_shard
from pipeline.activations.layout import StoreLayout, chunk_sums, restored, row_hashes, stored
from pipeline.activations.order import unit_order
from schemas.errors import IntegrityError, NonFiniteError
from schemas.layouts import POSITION, ROW, TOKEN, array_name, norm_name, shard_key
from schemas.records import ObjectEntry, Unit

# Largest relative difference between two forward passes of a row: rounding in another batch shape, plus
# rounding to the store's type.
ROUNDING = {"float32": 2e-4, "float16": 2e-3, "bfloat16": 1.6e-2}

# The same of a norm, which is a sum in float32 of a row's squares, and stored as it is.
NORM_ROUNDING = 1e-5

# Shards of a unit that are on their way at once.
WRITERS = 4


def write_unit(
    path: StoragePath,
    layout: StoreLayout,
    unit: int,
    activations: Mapping[str, torch.Tensor],
    tokens_N: npt.NDArray[np.int32],
    positions_N: npt.NDArray[np.int32],
) -> Unit:
    """Permute and write a unit's rows.

    Args:
        path: The stage's folder.
        layout: The store.
        unit: Which unit.
        activations: (N, D) rows of each hook point, in corpus order.
        tokens_N: Token ids, in corpus order.
        positions_N: Positions in their sequences, in corpus order.

    Returns:
        The unit, with an order-free hash per hook point in its facts, in all and for each chunk.

    Raises:
        NonFiniteError: a value is NaN or infinite, or becomes so in the store's type.
        IntegrityError: a shard is there already, and holds other rows.
    """
    first, end = layout.geometry.span(unit)
    order = unit_order(layout.seed, unit, end - first)
    slots = layout.geometry.shard_positions(unit)
    counts = layout.geometry.chunk_counts(unit)
    arrays = layout.arrays()
    objects: dict[str, ObjectEntry] = {}

    def put(name: str, values: npt.NDArray[Any], tolerance: float = 0.0) -> npt.NDArray[Any]:
        """Create a shard; returns the values that stand in the store."""
        body = encode_shard(arrays[name], _scattered(arrays[name], slots, values))
        key = shard_key(name, unit, values.ndim)
        if not create(path / key, body):
            body, block = read_checked(
                path / key,
                lambda body: (body, decode_shard(arrays[name], body, str(path / key))),
                listed=True,
                largest=len(body),
            )
            dtype = layout.dtype if values.ndim > 1 else "float32"
            values = _adopted(path / key, block[slots], values, dtype, tolerance)
        objects[name] = ObjectEntry.of(key, body)
        return values

    blocks, norms = {}, {}
    for hook_point, x_ND in activations.items():
        blocks[hook_point] = stored(x_ND, layout.dtype)[order]
        norms[hook_point] = _norms(blocks[hook_point], layout.dtype)
        # A norm is finite only where every value of its row is, and there are far fewer norms to look at.
        if not np.isfinite(norms[hook_point]).all():
            kept_ND = restored(blocks[hook_point], layout.dtype).float()
            _require_finite(kept_ND, x_ND, hook_point, unit, layout.dtype)
    # A disk and a bucket let one wait for each object; waiting for several takes no longer.
    with ThreadPoolExecutor(WRITERS, thread_name_prefix="shard") as executor:
        beside = [executor.submit(put, ROW, first + order), executor.submit(put, TOKEN, tokens_N[order])]
        beside.append(executor.submit(put, POSITION, positions_N[order]))
        standing = {
            hook_point: executor.submit(put, array_name(hook_point), block, ROUNDING[layout.dtype])
            for hook_point, block in blocks.items()
        }
        for hook_point, future in standing.items():
            if future.result() is not blocks[hook_point]:
                blocks[hook_point] = future.result()
                norms[hook_point] = _norms(blocks[hook_point], layout.dtype)
        measured = {
            hook_point: executor.submit(put, norm_name(hook_point), norm_N, NORM_ROUNDING)
            for hook_point, norm_N in norms.items()
        }
        rows, tokens, positions = (future.result() for future in beside)
        hashes = {
            hook_point: chunk_sums(row_hashes(rows, tokens, positions, future.result(), blocks[hook_point]), counts)
            for hook_point, future in measured.items()
        }
    totals = {hook_point: sum(sums) % 2**64 for hook_point, sums in hashes.items()}
    return Unit(
        objects=tuple(objects[name] for name in sorted(objects)),
        rows=end - first,
        row_min=first,
        row_max=end - 1,
        content_hash=f"{sum(totals.values()) % 2**64:016x}",
        facts={
            "hashes": {hook_point: f"{total:016x}" for hook_point, total in totals.items()},
            "chunks": {hook_point: [f"{each:016x}" for each in sums] for hook_point, sums in hashes.items()},
        },
    )


def read_back(
    layout: StoreLayout, unit: int, hook_point: str, body: bytes, rows: npt.NDArray[np.int64]
) -> torch.Tensor:
    """Rows of a unit out of an encoded shard, by their global row ids. Shape (len(rows), D), float32."""
    first, end = layout.geometry.span(unit)
    order = unit_order(layout.seed, unit, end - first)
    place = np.empty(end - first, np.int64)
    place[order] = layout.geometry.shard_positions(unit)
    block = decode_shard(layout.arrays()[array_name(hook_point)], body, shard_key(array_name(hook_point), unit, 2))
    return restored(block[place[rows - first]], layout.dtype).float()


def _norms(block: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    return np.asarray(restored(block, dtype).float().norm(dim=1).numpy(), np.float32)


def _adopted(
    where: StoragePath, there: npt.NDArray[Any], ours: npt.NDArray[Any], dtype: str, tolerance: float
) -> npt.NDArray[Any]:
    """A shard that an earlier attempt left without a record, if it holds what this one would have written.

    Activations and norms may differ by what the order of a sum does to them: another batch, another kind of GPU.

    Raises:
        IntegrityError: it holds something else.
    """
    if np.array_equal(there, ours):
        return there
    if tolerance:
        x_ND, expected_ND = restored(there, dtype).float(), restored(ours, dtype).float()
        x_ND, expected_ND = x_ND.reshape(len(x_ND), -1), expected_ND.reshape(len(x_ND), -1)
        scale_N = expected_ND.norm(dim=1).clamp_min(1e-20)
        if bool(((x_ND - expected_ND).norm(dim=1) / scale_N <= tolerance).all()):
            return there
    raise IntegrityError(
        f"{where} is there without a record, and holds other rows than this stage makes",
        "`kilobasis repair` removes it; then resume",
    )


def _scattered(spec: ArraySpec, slots: npt.NDArray[np.int64], values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if len(values) == spec.shard[0]:
        return values
    block = np.full(spec.shard, spec.fill, spec.dtype)
    block[slots] = values
    return block


def _require_finite(kept_ND: torch.Tensor, x_ND: torch.Tensor, hook_point: str, unit: int, dtype: str) -> None:
    bad = int((~torch.isfinite(kept_ND)).sum())
    if not bad:
        return
    made = int((~torch.isfinite(x_ND)).sum())
    if made:
        remedy = "look at the model's numbers there, for example with model.dtype: float32"
    else:
        remedy = f"the values overflow {dtype}; set harvest.dtype to bfloat16 or float32"
    raise NonFiniteError(f"harvest: {bad} NaN or infinite values in unit {unit} at hook point {hook_point!r}", remedy)
