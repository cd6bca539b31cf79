"""Opens a synthetic source: from the manifest's section, and what of it the stage made and keeps as objects."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import TypeAdapter

from cluster.storage.formats import read_tensors
from cluster.storage.path import StoragePath
from pipeline.synthetic.directions import random_directions
from pipeline.synthetic.rows import Source
from pipeline.synthetic.toy import ToySource, known_directions
from pipeline.synthetic.world import WorldSource
from schemas.records import ObjectEntry
from schemas.synthetic import Synthetic, Toy, World

_SECTION: TypeAdapter[World | Toy] = TypeAdapter(Synthetic)


def identity(section: World | Toy) -> dict[str, Any]:
    """Everything about a source that can change a row of it: not how many are made, nor how it was written down."""
    return section.model_dump(mode="json", exclude={"rows", "heldout_rows", "preset"})


def of_identity(identity: Mapping[str, Any]) -> World | Toy:
    """The section again; how many rows it has is not part of it.

    Raises:
        ValidationError: it is none.
    """
    return _SECTION.validate_python({**identity, "rows": 1})


def is_kept(section: World | Toy) -> bool:
    """Whether the source has something that takes too long to be made again, and is an object of the stage."""
    return isinstance(section, Toy) or section.interference.steps > 0


@functools.lru_cache(maxsize=2)
def open_source(section: World | Toy, hook_point: str, folder: StoragePath, entry: ObjectEntry | None) -> Source:
    """The rows of a hook point; the one opened last is kept for the next call in this process.

    Args:
        section: The manifest's section.
        hook_point: Which of its hook points.
        folder: The stage's.
        entry: What is kept of it, see `is_kept`.

    Raises:
        IntegrityError: what is kept is not what was committed.
    """
    tensors = _kept(folder, entry)
    if isinstance(section, Toy):
        return ToySource(section, hook_point, tensors)
    return WorldSource(section, _directions(section, tensors))


def open_directions(section: World | Toy, folder: StoragePath, entry: ObjectEntry | None) -> torch.Tensor:
    """What each known feature alone, at 1, adds to a row. Shape (M, D).

    Raises:
        IntegrityError: see `open_source`.
    """
    tensors = _kept(folder, entry)
    return known_directions(section, tensors) if isinstance(section, Toy) else _directions(section, tensors)


def _kept(folder: StoragePath, entry: ObjectEntry | None) -> dict[str, torch.Tensor]:
    return {} if entry is None else read_tensors(folder, entry)


def _directions(world: World, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if "directions" in tensors:
        return tensors["directions"]
    return random_directions(world.features, world.width, world.seed)
