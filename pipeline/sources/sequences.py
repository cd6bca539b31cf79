"""Token sequences as `tokenize` committed them: found by row, read, and batched for a forward pass."""

from __future__ import annotations

import io
import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import BaseModel, ConfigDict

from cluster.storage.formats import read_table
from cluster.storage.objects import read_recorded
from cluster.storage.parsing import parsing
from cluster.storage.path import StoragePath
from pipeline.stage import Committed
from schemas.layouts import TOKEN_INDEX
from schemas.records import ObjectEntry
from schemas.tables import TOKEN_INDEX as INDEX


class Piece(BaseModel):
    """One row group of the token files, and the global row of its first token."""

    model_config = ConfigDict(frozen=True)

    file: ObjectEntry
    row_group: int
    first_row: int
    rows: int


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """Consecutive tokens of one document. `first_row` is the global row id of the first one."""

    first_row: int
    tokens: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.tokens)


def pieces(tokens: Committed, split: str) -> list[Piece]:
    """Every row group of a split, in corpus order.

    Raises:
        IntegrityError: the index is absent or not the one that was committed.
    """
    table = read_table(tokens.path, tokens.entry(TOKEN_INDEX), INDEX, filters=[("split", "==", split)])
    with parsing(tokens.path / TOKEN_INDEX, "index of tokens"):
        return [
            Piece(
                file=ObjectEntry(key=row["key"], size=row["size"], sha256=row["sha256"]),
                row_group=row["row_group"],
                first_row=row["first_row"],
                rows=row["rows"],
            )
            for row in table.to_pylist()
        ]


def overlapping(all_pieces: Sequence[Piece], first: int, end: int) -> tuple[Piece, ...]:
    """The pieces with rows in [first, end), of pieces in corpus order. There may be as many as there are units."""
    start = bisect_right(all_pieces, first, key=lambda piece: piece.first_row + piece.rows)
    return tuple(all_pieces[start : bisect_left(all_pieces, end, key=lambda piece: piece.first_row)])


def read(path: StoragePath, wanted: Sequence[Piece], first: int, end: int) -> list[TokenSequence]:
    """Sequences that have rows in [first, end), whole, in corpus order.

    Raises:
        IntegrityError: a token file is absent or not what was committed.
    """
    found: list[TokenSequence] = []
    for file in dict.fromkeys(piece.file for piece in wanted):
        body = read_recorded(path, file)
        with parsing(path / file.key, "Parquet file of tokens"):
            table = pq.ParquetFile(io.BytesIO(body))
            for piece in wanted:
                if piece.file == file:
                    column = table.read_row_group(piece.row_group, columns=["tokens"]).column(0).combine_chunks()
                    found += _within(piece, column, first, end)
    return found


def _within(piece: Piece, column: pa.ListArray, first: int, end: int) -> Iterator[TokenSequence]:
    """The sequences of a row group that have rows in [first, end)."""
    offsets, values = column.offsets.to_numpy(), column.values.to_numpy()
    for start, stop in itertools.pairwise(offsets):
        row = piece.first_row + int(start - offsets[0])
        if row < end and row + int(stop - start) > first:
            yield TokenSequence(row, values[start:stop].astype(np.int32))


def batches(sequences: Sequence[TokenSequence], batch_tokens: int) -> Iterator[list[TokenSequence]]:
    """Sequences of like length together, so that little is padded; at most `batch_tokens` with the padding.

    The grouping is a pure function of the sequences, because the shape of a batch can change the last bits
    of a forward pass.
    """
    group: list[TokenSequence] = []
    for sequence in sorted(sequences, key=len, reverse=True):
        if group and (len(group) + 1) * len(group[0]) > batch_tokens:
            yield group
            group = []
        group.append(sequence)
    if group:
        yield group


def padded(batch: Sequence[TokenSequence]) -> dict[str, torch.Tensor]:
    """Model inputs, padded at the end. Shapes (batch, position); no mask where nothing is padded."""
    longest = max(len(sequence) for sequence in batch)
    ids = np.zeros((len(batch), longest), np.int64)
    mask = np.zeros((len(batch), longest), np.int64)
    for index, sequence in enumerate(batch):
        ids[index, : len(sequence)] = sequence.tokens
        mask[index, : len(sequence)] = 1
    inputs = {"input_ids": torch.from_numpy(ids)}
    if not mask.all():
        inputs["attention_mask"] = torch.from_numpy(mask)
    return inputs
