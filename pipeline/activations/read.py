"""Reads a store back: slab by slab as a globally shuffled stream, or unit by unit in corpus order."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import zarr

from cluster.storage.path import StoragePath
from cluster.storage.zarr_store import RecordedStore
from pipeline.activations.layout import StoreLayout, hash_sum, restored, row_hashes
from pipeline.activations.order import epoch_slabs, slab_order, unit_order
from schemas.errors import IntegrityError, StageFailedError
from schemas.layouts import POSITION, ROW, STORE, TOKEN, array_name, norm_name, shard_key
from schemas.records import REPAIR, ObjectEntry
from schemas.training import Filter


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of one hook point: `x_ND` in the store's type, ids and positions aligned with it."""

    x_ND: torch.Tensor
    row_N: npt.NDArray[np.int64]
    position_N: npt.NDArray[np.int32]
    norm_N: npt.NDArray[np.float32]
    hash_sum: int

    def __len__(self) -> int:
        return len(self.row_N)


class ActivationStore:
    """A committed harvest, open for reading.

    Args:
        path: The harvest's folder.
        layout: The store's layout, from the harvest's facts.
        entries: Every object that the harvest's records name.
        sums: Hash sums of each chunk, by hook point and unit.
    """

    def __init__(
        self,
        path: StoragePath,
        layout: StoreLayout,
        entries: list[ObjectEntry],
        sums: Mapping[tuple[str, int], Sequence[int]],
    ) -> None:
        self.path, self.layout, self._sums = path, layout, sums
        self._store = RecordedStore(path, STORE, entries)
        self._arrays: dict[str, zarr.Array[Any]] = {}

    def _read(self, name: str, start: int, end: int) -> npt.NDArray[Any]:
        if name not in self._arrays:
            self._arrays[name] = zarr.open_array(self._store, path=name, mode="r")
        try:
            return self._checked(name, start, end)
        except ValueError as error:
            raise IntegrityError(
                f"{self.path}/{STORE}/{name} rows [{start}, {end}) of unit {start // self.layout.unit_rows} "
                f"are damaged ({error})",
                REPAIR,
            ) from error

    def _checked(self, name: str, start: int, end: int) -> npt.NDArray[Any]:
        try:
            return np.asarray(self._arrays[name][start:end])
        except ValueError:
            if self.path.is_local:
                raise
            # A checksum does not hold. What was garbled on the way is right the second time.
            return np.asarray(self._arrays[name][start:end])

    def slab(self, hook_point: str, slab: int) -> Rows:
        """Chunk `slab` of every unit, unit after unit: a stratified random sample of the corpus.

        Raises:
            IntegrityError: something is absent, damaged, or not the rows that belong here.
        """
        cut = self.layout.geometry
        parts = [self._chunk(hook_point, unit, slab) for unit in range(cut.units)]
        return Rows(
            torch.cat([part.x_ND for part in parts]),
            np.concatenate([part.row_N for part in parts]),
            np.concatenate([part.position_N for part in parts]),
            np.concatenate([part.norm_N for part in parts]),
            sum(part.hash_sum for part in parts) % 2**64,
        )

    def _chunk(self, hook_point: str, unit: int, slab: int) -> Rows:
        cut = self.layout.geometry
        counts = cut.chunk_counts(unit)
        start = unit * cut.unit_rows + slab * cut.chunk_rows
        end = start + int(counts[slab])
        first, last = cut.span(unit)
        before = int(counts[:slab].sum())
        expected = first + unit_order(self.layout.seed, unit, last - first)[before : before + int(counts[slab])]
        block = self._read(array_name(hook_point), start, end)
        rows, tokens = self._read(ROW, start, end), self._read(TOKEN, start, end)
        positions, norms = self._read(POSITION, start, end), self._read(norm_name(hook_point), start, end)
        total = hash_sum(row_hashes(rows, tokens, positions, norms, block))
        if not np.array_equal(rows, expected) or total != self._sums[hook_point, unit][slab]:
            raise self._other_rows(hook_point, unit, slab)
        return Rows(restored(block, self.layout.dtype), rows, positions, norms, total)

    def _other_rows(self, hook_point: str, unit: int, slab: int) -> IntegrityError:
        return IntegrityError(
            f"{self.path / shard_key(array_name(hook_point), unit, 2)}, or a shard {unit} beside it, holds other rows "
            f"in chunk {slab} than were committed",
            REPAIR,
        )

    def unit(self, hook_point: str, unit: int) -> tuple[torch.Tensor, npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """A whole unit in corpus order: (N, D) rows in the store's type, token ids, positions.

        Raises:
            IntegrityError: something is absent or damaged.
        """
        cut = self.layout.geometry
        first, last = cut.span(unit)
        place = np.empty(last - first, np.int64)
        place[unit_order(self.layout.seed, unit, last - first)] = cut.shard_positions(unit)
        start, end = unit * cut.unit_rows, (unit + 1) * cut.unit_rows
        # Whole shards, whose sha256 is checked on the way.
        names = (ROW, TOKEN, POSITION, array_name(hook_point))
        rows, tokens, positions, block = (self._read(name, start, end)[place] for name in names)
        if not np.array_equal(rows, np.arange(first, last)):
            raise self._other_rows(hook_point, unit, 0)
        return restored(block, self.layout.dtype), tokens, positions


@dataclass(frozen=True, slots=True)
class Cursor:
    """A place in the stream: the next row to be read is `row` of the epoch's `slab`-th slab.

    `seen` and `hash` add up the whole slabs of this epoch that lie behind, before filtering, so that the
    end of an epoch can prove that every row passed exactly once.
    """

    epoch: int = 0
    slab: int = 0
    row: int = 0
    seen: int = 0
    hash: int = 0


class Stream:
    """The training stream of hook points, side by side: endless epochs, globally shuffled, resumable at any row.

    Every rank sees the same stream and takes its share of each batch. The next slab is read while the
    current one is consumed, so that at most two are in memory.

    Args:
        store: Where the rows are.
        hook_points: Whose rows: D is the sum of their widths. The first one's norms are what the filter sees.
        seed: Decides the order of every epoch.
        batch: Rows in a batch, over all ranks.
        passing: Rows to pass over.
        expected_hash: The sum of the harvest's hash sums of these hook points.
    """

    def __init__(
        self,
        store: ActivationStore,
        hook_points: tuple[str, ...],
        seed: int,
        batch: int,
        passing: Filter,
        expected_hash: int,
    ) -> None:
        self._store, self._hook_points, self._seed, self._batch = store, hook_points, seed, batch
        self._filter, self._expected = passing, expected_hash % 2**64
        self._ready = 0
        self._norm_limit: float | None = None
        if passing.max_norm is not None:
            self._norm_limit = passing.max_norm * float(np.median(store.slab(hook_points[0], 0).norm_N))

    @property
    def ready(self) -> int:
        """Whole batches that are in memory, and need not be waited for."""
        return self._ready

    def sample(self) -> torch.Tensor:
        """Slab 0, filtered, in float32: a stratified random sample of the corpus. Shape (N, D)."""
        return self._kept(self._slab(0)).float()

    def _slab(self, slab: int) -> Rows:
        """The same tokens of every hook point."""
        parts = [self._store.slab(hook_point, slab) for hook_point in self._hook_points]
        if len(parts) == 1:
            return parts[0]
        total = sum(part.hash_sum for part in parts) % 2**64
        return replace(parts[0], x_ND=torch.cat([part.x_ND for part in parts], 1), hash_sum=total)

    @property
    def _name(self) -> str:
        return " and ".join(repr(hook_point) for hook_point in self._hook_points)

    def _kept(self, rows: Rows) -> torch.Tensor:
        keep = rows.position_N >= self._filter.skip_positions
        if self._norm_limit is not None:
            keep &= rows.norm_N <= self._norm_limit
        return rows.x_ND if keep.all() else rows.x_ND[torch.from_numpy(keep)]

    def _load(self, epoch: int, index: int) -> tuple[torch.Tensor, int, int]:
        slab = int(epoch_slabs(self._seed, epoch, self._store.layout.geometry.slabs)[index])
        rows = self._slab(slab)
        kept = self._kept(rows)
        order = torch.from_numpy(slab_order(self._seed, epoch, slab, len(kept)))
        return kept[order], len(rows), rows.hash_sum

    def _advance(self, cursor: Cursor, rows: int, hash_: int) -> Cursor:
        """The cursor behind a finished slab; at the end of an epoch, proves its conservation."""
        seen, total = cursor.seen + rows, (cursor.hash + hash_) % 2**64
        if cursor.slab + 1 < self._store.layout.geometry.slabs:
            return Cursor(cursor.epoch, cursor.slab + 1, 0, seen, total)
        if (seen, total) != (self._store.layout.rows, self._expected):
            raise IntegrityError(
                f"epoch {cursor.epoch} of {self._name} streamed {seen} rows with hash {total:016x}, "
                f"harvested were {self._store.layout.rows} with {self._expected:016x}",
                REPAIR,
            )
        return Cursor(cursor.epoch + 1)

    def batches(self, cursor: Cursor) -> Generator[tuple[torch.Tensor, Cursor]]:
        """Yield (B, D) batches in the store's type, each with the cursor behind it, without end.

        Raises:
            StageFailedError: the filter leaves no row.
            IntegrityError: the store is damaged.
        """
        slabs = self._store.layout.geometry.slabs
        with ThreadPoolExecutor(1, thread_name_prefix="slab") as executor:

            def request(at: Cursor) -> Future[tuple[torch.Tensor, int, int]]:
                return executor.submit(self._load, at.epoch, at.slab)

            ahead = request(cursor)
            carried: list[torch.Tensor] = []
            wanted = self._batch
            barren = 0
            while True:
                x_ND, rows, hash_ = ahead.result()
                following = (
                    Cursor(cursor.epoch, cursor.slab + 1) if cursor.slab + 1 < slabs else Cursor(cursor.epoch + 1)
                )
                ahead = request(following)
                barren = 0 if len(x_ND) else barren + 1
                if barren > slabs:
                    raise StageFailedError(
                        f"the filter of {self._name} leaves no row of {self._store.layout.rows}",
                        "relax train.filter",
                    )
                while len(x_ND) - cursor.row >= wanted:
                    taken = x_ND[cursor.row : cursor.row + wanted]
                    cursor = replace(cursor, row=cursor.row + wanted)
                    read = len(ahead.result()[0]) if ahead.done() and ahead.exception() is None else 0
                    self._ready = (len(x_ND) - cursor.row + read) // self._batch
                    yield (torch.cat([*carried, taken]) if carried else taken), cursor
                    carried, wanted = [], self._batch
                if cursor.row < len(x_ND):
                    # Cloned, so that the rest of a slab does not keep the whole of it alive.
                    carried.append(x_ND[cursor.row :].clone())
                    wanted -= len(carried[-1])
                cursor = self._advance(cursor, rows, hash_)
