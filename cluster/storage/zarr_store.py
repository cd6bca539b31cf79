"""Plain Zarr v3 arrays, written shard by shard as whole objects and read only through their records.

Zarr takes an absent shard for one of fill values. Here it never gets the chance: a reader opens only
what committed records name, and anything absent or of another size is an error with the key in it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import MemoryStore

from cluster.storage.objects import SECOND_LOOKS, locate, read_range, read_recorded
from cluster.storage.path import StoragePath
from schemas.errors import IntegrityError
from schemas.records import REPAIR, ObjectEntry


class ArraySpec:
    """One array of a store: a shard per unit, `chunk_rows` rows to an inner chunk, crc32c on each and on the index.

    Args:
        units: Shards along the first axis.
        unit_rows: Rows of a shard.
        chunk_rows: Rows of an inner chunk.
        tail: The other axes; () for one number a row.
        dtype: numpy name.
        fill: Fill value, one that real data cannot have.
        attributes: JSON kept with the array.
    """

    def __init__(
        self,
        units: int,
        unit_rows: int,
        chunk_rows: int,
        tail: tuple[int, ...],
        dtype: str,
        fill: float | int,
        attributes: Mapping[str, Any],
    ) -> None:
        self.shape = (units * unit_rows, *tail)
        self.shard = (unit_rows, *tail)
        self.chunk = (chunk_rows, *tail)
        self.dtype, self.fill, self.attributes = dtype, fill, dict(attributes)

    def create(self, store: Store, name: str, rows: int) -> zarr.Array[Any]:
        """The array's metadata in a store, for `rows` rows."""
        return zarr.create_array(
            store,
            name=name,
            shape=(rows, *self.shape[1:]),
            dtype=self.dtype,
            chunks=self.shard,
            # The index stands at the start of a shard: one store family cannot serve suffix ranges.
            serializer=ShardingCodec(
                chunk_shape=self.chunk,
                codecs=[BytesCodec(), Crc32cCodec()],
                index_codecs=[BytesCodec(), Crc32cCodec()],
                index_location="start",
            ),
            compressors=None,
            filters=None,
            fill_value=self.fill,
            attributes=self.attributes,
            dimension_names=("row", "channel")[: len(self.shape)],
            config={"write_empty_chunks": True},
        )


def metadata(arrays: Mapping[str, ArraySpec], attributes: Mapping[str, Any]) -> dict[str, bytes]:
    """The `zarr.json` objects of a group and its arrays, by key below the group."""
    store = MemoryStore()
    zarr.create_group(store, attributes=dict(attributes))
    for name, spec in arrays.items():
        spec.create(store, name, spec.shape[0])
    return {key: value.to_bytes() for key, value in sorted(store._store_dict.items())}


def encode_shard(spec: ArraySpec, block: npt.NDArray[Any]) -> bytes:
    """The bytes of one whole shard, as Zarr itself encodes it."""
    if block.shape != spec.shard:
        raise ValueError(f"a shard holds {spec.shard}, the block is {block.shape}")
    store = MemoryStore()
    array = spec.create(store, "shard", spec.shard[0])
    array[...] = block
    (body,) = [value for key, value in store._store_dict.items() if not key.endswith("zarr.json")]
    return body.to_bytes()


def decode_shard(spec: ArraySpec, body: bytes, where: str) -> npt.NDArray[Any]:
    """A shard's block, from its bytes; `where` it lies is for the message.

    Raises:
        IntegrityError: a checksum does not hold.
    """
    if not body:
        # Zarr takes it for a shard of fill values.
        raise IntegrityError(f"{where} cannot be decoded (it is empty)", REPAIR)
    store = MemoryStore()
    array = spec.create(store, "shard", spec.shard[0])
    key = "shard/c/" + "/".join("0" for _ in spec.shard)
    store._store_dict[key] = zarr.core.buffer.cpu.Buffer.from_bytes(body)
    try:
        return np.asarray(array[...])
    except ValueError as error:
        raise IntegrityError(f"{where} cannot be decoded ({error})", REPAIR) from error


class RecordedStore(Store):
    """A read-only Zarr store that holds exactly the objects which committed records name."""

    def __init__(self, path: StoragePath, prefix: str, entries: Iterable[ObjectEntry]) -> None:
        super().__init__(read_only=True)
        self._path = path
        self._entries = {
            entry.key.removeprefix(prefix + "/"): entry for entry in entries if entry.key.startswith(prefix + "/")
        }

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RecordedStore) and (self._path, self._entries) == (other._path, other._entries)

    __hash__ = None  # type: ignore[assignment]

    def _fetch(self, key: str, request: ByteRequest | None) -> bytes:
        entry = self._entries[key]
        start, end = 0, entry.size
        if isinstance(request, RangeByteRequest):
            start, end = request.start, min(request.end, entry.size)
        elif isinstance(request, OffsetByteRequest):
            start = request.offset
        elif isinstance(request, SuffixByteRequest):
            start = max(0, entry.size - request.suffix)
        if request is None:
            return read_recorded(self._path, entry)
        return _committed_range(locate(self._path, entry.key), start, end)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """An object or a range of it; None only for a key that no record names (Zarr probes for some)."""
        if key not in self._entries:
            if "/c/" in key:
                raise IntegrityError(f"{self._path / key} is named by no record", REPAIR)
            return None
        return prototype.buffer.from_bytes(await asyncio.to_thread(self._fetch, key, byte_range))

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Several ranges."""
        return list(await asyncio.gather(*(self.get(key, prototype, wanted) for key, wanted in key_ranges)))

    async def exists(self, key: str) -> bool:
        """Whether a record names the key."""
        return key in self._entries

    @property
    def supports_writes(self) -> bool:
        """Never."""
        return False

    @property
    def supports_deletes(self) -> bool:
        """Never."""
        return False

    @property
    def supports_listing(self) -> bool:
        """Lists what the records name."""
        return True

    async def set(self, key: str, value: Buffer) -> None:
        """Refused."""
        raise PermissionError(f"{self._path} is read through its records and cannot be written to ({key})")

    async def delete(self, key: str) -> None:
        """Refused."""
        raise PermissionError(f"{self._path} is read through its records and cannot be deleted from ({key})")

    async def list(self) -> AsyncIterator[str]:
        """Every key."""
        for key in sorted(self._entries):
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """Every key that begins so."""
        for key in sorted(self._entries):
            if key.startswith(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Names directly below a prefix."""
        below = prefix.rstrip("/") + "/" if prefix else ""
        for name in sorted({key[len(below) :].split("/")[0] for key in self._entries if key.startswith(below)}):
            yield name


def _committed_range(path: StoragePath, start: int, end: int) -> bytes:
    for look in range(SECOND_LOOKS):
        # A bucket that denies a committed object, or cuts it short, may not do so the next time.
        last = look + 1 == SECOND_LOOKS or path.is_local
        try:
            body = read_range(path, start, end)
        except FileNotFoundError as error:
            if last:
                raise IntegrityError(f"{path} is committed, but absent", REPAIR) from error
            continue
        if last or len(body) == end - start:
            break
    if len(body) != end - start:
        raise IntegrityError(f"{path} gave {len(body)} bytes of [{start}, {end}), it was cut short", REPAIR)
    return body
