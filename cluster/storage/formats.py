"""Committed objects as what they hold: tables, tensors, JSON.

A record vouches for bytes, not for their meaning. Whoever can write to a root can commit anything, so what
does not parse is damage like any other: an error with the object's name in it. Nothing here can run code.
"""

from __future__ import annotations

import io
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch

from cluster.storage.objects import read_recorded
from cluster.storage.parsing import parsing
from cluster.storage.path import StoragePath
from schemas.records import ObjectEntry


def read_table(folder: StoragePath, entry: ObjectEntry, schema: pa.Schema | None = None, **options: Any) -> pa.Table:
    """A committed Parquet file.

    Args:
        folder: Where the entry's key starts.
        entry: The object, as a record names it.
        schema: The columns that it must have; None where the columns differ from run to run.
        options: See `pyarrow.parquet.read_table`; `columns` is not among them.

    Raises:
        IntegrityError: it is absent, not what was committed, or no such table.
    """
    body = read_recorded(folder, entry)
    with parsing(folder / entry.key, "Parquet file"):
        table = pq.read_table(io.BytesIO(body), **options)
        if schema is not None and not table.schema.equals(schema):
            raise ValueError(f"columns {', '.join(table.schema.names)}, expected {', '.join(schema.names)}")
    return table


def read_tensors(folder: StoragePath, entry: ObjectEntry) -> dict[str, torch.Tensor]:
    """A committed safetensors file.

    Raises:
        IntegrityError: it is absent, not what was committed, or no such file.
    """
    body = read_recorded(folder, entry)
    with parsing(folder / entry.key, "safetensors file"):
        tensors: dict[str, torch.Tensor] = safetensors.torch.load(body)
    return tensors


def read_document(folder: StoragePath, entry: ObjectEntry) -> dict[str, Any]:
    """A committed JSON object.

    Raises:
        IntegrityError: it is absent, not what was committed, or no JSON object.
    """
    body = read_recorded(folder, entry)
    with parsing(folder / entry.key, "JSON object"):
        found = json.loads(body)
        if not isinstance(found, dict):
            raise TypeError(f"found {type(found).__name__}")
    return found
