"""Tensors of features in files that every store takes: cut by rows, packed one at a time, and put together again.

A bucket takes at most 5 GB in one conditional request, and a file that is being packed is in memory twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import safetensors.torch
import torch

# Of one file, as far as its rows can be cut at all.
PIECE_BYTES = 2**30

# Whether a tensor of that name has a row for every feature.
HasRows = Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class Piece:
    """One of `count` files."""

    index: int
    count: int
    body: bytes


def cut(tensors: Mapping[str, torch.Tensor], has_rows: HasRows) -> Iterator[Piece]:
    """Tensors as safetensors files of about equal size, each with some of the rows, in order; the rest is in the first.

    Args:
        tensors: Contiguous, on the host; those with rows have equally many.
        has_rows: Which of them have.
    """
    rows = {name for name in tensors if has_rows(name)}
    features = min((len(tensors[name]) for name in rows), default=1)
    size = sum(value.nbytes for value in tensors.values())
    count = max(1, min(features, -(-size // PIECE_BYTES)))
    for index in range(count):
        some = slice(features * index // count, features * (index + 1) // count)
        part = {name: value[some] if name in rows else value for name, value in tensors.items()}
        if index:
            part = {name: part[name] for name in rows}
        yield Piece(index, count, safetensors.torch.save(part))


def join(
    bodies: Iterable[bytes], has_rows: HasRows, first: int, count: int, wanted: HasRows = lambda _: True
) -> tuple[dict[str, torch.Tensor], int]:
    """Some rows out of files that follow each other, of which one at a time is in memory; and how many rows they have.

    Args:
        bodies: The files, in order.
        has_rows: See `cut`. Every file has a tensor with rows.
        first: The first row wanted.
        count: How many.
        wanted: Which tensors.
    """
    made: dict[str, torch.Tensor] = {}
    pieces: dict[str, list[torch.Tensor]] = {}
    start = 0
    for body in bodies:
        part = safetensors.torch.load(body)
        size = next((len(value) for name, value in part.items() if has_rows(name)), 0)
        some = slice(max(0, first - start), max(0, first + count - start))
        for name, value in part.items():
            if not wanted(name):
                continue
            if has_rows(name):
                rows = value[some]
                # A copy lets go of a file of which little is wanted.
                pieces.setdefault(name, []).append(rows if len(rows) == size else rows.clone())
            else:
                made.setdefault(name, value)
        start += size
    for name in list(pieces):
        few = pieces.pop(name)
        made[name] = torch.cat(few) if len(few) > 1 else few[0]
    return made, start
