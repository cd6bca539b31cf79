"""What somebody could put into a root, a corpus or a model folder who means harm: payloads, and records that vouch."""

import gzip
import io
import json
import os
import pickle
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import zstandard

from schemas.layouts import COMMITTED, LOG, UNITS
from schemas.records import (
    SEAL,
    CheckpointRecord,
    ObjectEntry,
    StageRecord,
    UnitRecord,
    _seal,
    parse_record,
    parse_slot,
)

MIB = 1 << 20


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self._marker = str(marker)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (self._marker,)


def plain_pickle(marker: Path) -> bytes:
    """As `pickle.load` reads it."""
    return pickle.dumps(Trap(marker))


def torch_pickle(marker: Path) -> bytes:
    """As `torch.load` reads it: a zip with a pickle."""
    buffer = io.BytesIO()
    torch.save({"state_dict": Trap(marker)}, buffer)
    return buffer.getvalue()


def numpy_pickle(marker: Path) -> bytes:
    """As `numpy.load` reads it, if pickles are allowed."""
    buffer = io.BytesIO()
    np.save(buffer, np.array([Trap(marker)], object), allow_pickle=True)
    return buffer.getvalue()


PICKLES = {"pickle": plain_pickle, "torch": torch_pickle, "numpy": numpy_pickle}

# What nobody may do, to see that a trap is one.
CARELESS: dict[str, Callable[[bytes], object]] = {
    "pickle": pickle.loads,
    "torch": lambda body: torch.load(io.BytesIO(body), weights_only=False),
    "numpy": lambda body: np.load(io.BytesIO(body), allow_pickle=True),
}


# Records


def sealed(content: dict[str, Any]) -> bytes:
    """A record with any content at all, and a seal that holds."""
    content.pop(SEAL, None)
    text = json.dumps(content, indent=1, sort_keys=True).removesuffix("\n}").encode()
    return text + _seal(text)


def rewrite(path: Path, change: Callable[[Any], object]) -> None:
    """Change the content of a record, and seal it again."""
    content = json.loads(path.read_bytes())
    change(content)
    path.write_bytes(sealed(content))


def vouch(path: Path, body: bytes) -> None:
    """Put a body in the place of a committed object, and make the records of its stage vouch for it."""
    stage = next(folder for folder in path.parents if (folder / "SPEC.json").exists())
    key = path.relative_to(stage).as_posix()
    path.write_bytes(body)
    entry = ObjectEntry.of(key, body)

    def replaced(entries: tuple[ObjectEntry, ...]) -> tuple[ObjectEntry, ...]:
        return tuple(entry if each.key == key else each for each in entries)

    digests = {}
    for where in sorted((stage / UNITS).glob("*.json")):
        unit = parse_record(UnitRecord, where.read_bytes(), "it")
        unit = unit.model_copy(update={"made": unit.made.model_copy(update={"objects": replaced(unit.made.objects)})})
        where.write_bytes(unit.body())
        digests[unit.unit] = unit.digest
    for where in sorted((stage / LOG).glob("*.json")):
        slot = parse_slot(where.read_bytes(), "it")
        if isinstance(slot, CheckpointRecord):
            where.write_bytes(slot.model_copy(update={"objects": replaced(slot.objects)}).body())
    if (stage / COMMITTED).exists():
        record = parse_record(StageRecord, (stage / COMMITTED).read_bytes(), "it")
        outputs = record.outputs.model_copy(update={"objects": replaced(record.outputs.objects)})
        record = record.model_copy(update={"outputs": outputs, "units": digests})
        (stage / COMMITTED).write_bytes(record.body())


def vouch_in_table(table: Path, path: Path, body: bytes) -> None:
    """The same for an object that a Parquet table lists with its size and sha256."""
    stage = table.parent
    vouch(path, body)
    entry = ObjectEntry.of(path.relative_to(stage).as_posix(), body)
    rows = pq.read_table(table)
    lines = [line | entry.model_dump() if line["key"] == entry.key else line for line in rows.to_pylist()]
    relist(table, lines)


def relist(table: Path, lines: list[dict[str, Any]]) -> None:
    """Other lines for a Parquet table that a stage committed."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(lines, pq.read_schema(table)), buffer)
    vouch(table, buffer.getvalue())


# Files that are more than they seem


def gzip_bomb(head: bytes, mebibytes: int) -> bytes:
    """A thousandth of what it holds: `head` and then one letter without end."""
    return gzip.compress(head) + gzip.compress(b"a" * (64 * MIB)) * (mebibytes // 64)


def zstd_bomb(head: bytes, mebibytes: int) -> bytes:
    """A thirty thousandth of what it holds."""
    return zstandard.compress(head) + zstandard.compress(b"a" * (64 * MIB)) * (mebibytes // 64)


def parquet_bomb(rows: int, mebibytes: int) -> bytes:
    """One long text, and a column that repeats it by its number."""
    text = pa.array(["a " * (mebibytes * MIB // 2)])
    column = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), text)
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": column}), buffer, compression="zstd", store_schema=False)
    return buffer.getvalue()


def lying_safetensors() -> Iterator[tuple[str, bytes]]:
    """Headers that say something else than what is there."""
    yield "header_longer_than_the_file", struct.pack("<Q", 2**40) + b"{}"
    yield "header_of_2_to_the_63", struct.pack("<Q", 2**63) + b"{}"
    for name, tensor in {
        "data_beyond_the_file": {"dtype": "F32", "shape": [2**20], "data_offsets": [0, 2**22]},
        "shape_that_overflows": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 16]},
        "offsets_backwards": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]},
        "dtype_unheard_of": {"dtype": "O", "shape": [1], "data_offsets": [0, 8]},
    }.items():
        header = json.dumps({"a": tensor}).encode()
        yield name, struct.pack("<Q", len(header)) + header + bytes(16)


def lying_parquet(body: bytes) -> Iterator[tuple[str, bytes]]:
    """Footers that say something else than what is there."""
    yield "footer_longer_than_the_file", body[:-8] + struct.pack("<I", 2**31 - 1) + b"PAR1"
    yield "footer_of_nothing", body[:-8] + struct.pack("<I", 0) + b"PAR1"
    yield "no_end", body[:-4] + b"XXXX"
