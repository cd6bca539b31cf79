"""Writes one unit: permutes its rows and creates exactly one shard in every array of the store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cluster.storage.create import create_or_adopt
from cluster.storage.path import StoragePath
from cluster.storage.zarr_store import ArraySpec, decode_shard, encode_shard
from pipeline.activations.layout import StoreLayout, hash_sum, restored, row_hashes, stored
from pipeline.activations.order import unit_order
from schemas.errors import NonFiniteError
from schemas.layouts import POSITION, ROW, TOKEN, array_name, norm_name, shard_key
from schemas.records import ObjectEntry, Unit


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
        The unit, with an order-free hash per hook point in its facts.

    Raises:
        NonFiniteError: a value is NaN or infinite, or becomes so in the store's type.
        IntegrityError: a shard is there already, with another content.
    """
    first, end = layout.geometry.span(unit)
    order = unit_order(layout.seed, unit, end - first)
    slots = layout.geometry.shard_positions(unit)
    rows = first + order
    arrays = layout.arrays()
    objects: list[ObjectEntry] = []

    def put(name: str, values: npt.NDArray[Any]) -> None:
        body = encode_shard(arrays[name], _scattered(arrays[name], slots, values))
        key = shard_key(name, unit, values.ndim)
        create_or_adopt(path / key, body)
        objects.append(ObjectEntry.of(key, body))

    put(ROW, rows)
    put(TOKEN, tokens_N[order])
    put(POSITION, positions_N[order])
    hashes = {}
    for hook_point, x_ND in activations.items():
        block = stored(x_ND, layout.dtype)[order]
        kept_ND = restored(block, layout.dtype).float()
        norm_N = kept_ND.norm(dim=1)
        # A norm is finite only where every value of its row is, and there are far fewer norms to look at.
        if not torch.isfinite(norm_N).all():
            _require_finite(kept_ND, x_ND, hook_point, unit, layout.dtype)
        hashes[hook_point] = hash_sum(row_hashes(rows, block))
        put(array_name(hook_point), block)
        put(norm_name(hook_point), norm_N.numpy())
    return Unit(
        objects=tuple(objects),
        rows=end - first,
        row_min=first,
        row_max=end - 1,
        content_hash=f"{sum(hashes.values()) % 2**64:016x}",
        facts={"hashes": {hook_point: f"{value:016x}" for hook_point, value in hashes.items()}},
    )


def read_back(
    layout: StoreLayout, unit: int, hook_point: str, body: bytes, rows: npt.NDArray[np.int64]
) -> torch.Tensor:
    """Rows of a unit out of an encoded shard, by their global row ids. Shape (len(rows), D), float32."""
    first, end = layout.geometry.span(unit)
    order = unit_order(layout.seed, unit, end - first)
    place = np.empty(end - first, np.int64)
    place[order] = layout.geometry.shard_positions(unit)
    block = decode_shard(layout.arrays()[array_name(hook_point)], body)
    return restored(block[place[rows - first]], layout.dtype).float()


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
