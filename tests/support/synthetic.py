"""Small synthetic sources, and manifests over them that run inline in seconds."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.synthetic.directions import random_directions
from pipeline.synthetic.draws import BLOCK_ROWS, Split
from pipeline.synthetic.rows import Active
from pipeline.synthetic.world import WorldSource
from schemas.synthetic import World

PRESET = "synthsaebench-16k-v2"


def world_tree(**changes: Any) -> dict[str, Any]:
    """A world of 60 features in 12 neurons, without anything that makes it hard."""
    firing = {"exponent": 0.5, "max_probability": 0.3, "min_probability": 0.01}
    return {
        "kind": "world",
        "features": 60,
        "width": 12,
        "firing": firing,
        "rows": 6000,
        "heldout_rows": 2500,
    } | changes


def toy_tree(**changes: Any) -> dict[str, Any]:
    """Two toy models of 12 features in 4 neurons, hardly trained."""
    tree = {"kind": "toy", "model": "relu_output", "features": 12, "hidden": 4, "sparsities": [0.5, 0.95]}
    return tree | {"train": {"steps": 200, "batch": 128}, "rows": 6000, "heldout_rows": 2500} | changes


def manifest_tree(synthetic: dict[str, Any], root: Path, hook_point: str = "hidden", **train: Any) -> dict[str, Any]:
    """A manifest of one dictionary."""
    return {
        "name": "known",
        "root": str(root),
        "synthetic": synthetic,
        "harvest": {"dtype": "float32", "unit_rows": 2048, "chunk_rows": 256, "batch_tokens": 600},
        "dictionaries": [
            {
                "name": "small",
                "hook_point": hook_point,
                "features": 64,
                "k": 3,
                "train": {"tokens": 8192, "batch": 256, "learning_rate": 3e-3, "dead_after": 4096} | train,
                "evaluate": {"tokens": 2000},
                "catalog": {"tokens": 100_000, "examples": 3},
            }
        ],
        "compute": {"pool": "inline", "rank_threads": 1},
    }


def source_of(world: World) -> WorldSource:
    """The rows of a world whose directions are random."""
    return WorldSource(world, random_directions(world.features, world.width, world.seed))


def codes(world: World, blocks: int, split: Split = Split.TRAIN) -> Active:
    """The true codes of some blocks of rows."""
    source = source_of(world)
    return Active.joined([source.active(split, index) for index in range(blocks)])


def dense(active: Active, features: int) -> npt.NDArray[np.float32]:
    """A small code as a matrix. Shape (N, F)."""
    z_NF = np.zeros((len(active), features), np.float32)
    z_NF[active.rows(), active.feature_E] = active.value_E
    return z_NF


ROWS = BLOCK_ROWS
