"""Bytes that training a dictionary keeps on a rank: an upper bound, by what is sharded."""

from __future__ import annotations

from typing import NamedTuple

from pipeline.dictionary.pieces import PIECE_BYTES
from schemas.compute import Compute
from schemas.manifest import Dictionary
from schemas.training import Train
from schemas.tree import Tree

# Scores of a block of features for a block of tokens, where torch alone searches.
SEARCH_MEMORY = 2**27
# The most that a GPU's search keeps of groups of features, see `kernels.cuda_search`.
CARD_SEARCH = 2**30
# Times k: so many features of a row are reckoned with where all that are above a threshold fire.
THRESHOLD_FACTOR = 16


def firing(activation: str, k: int, features: int) -> int:
    """Features of the busiest row that are reckoned with."""
    return k if activation == "topk" else min(features, THRESHOLD_FACTOR * k)


def searching(features: int, width: int, rows: int, on_card: bool) -> int:
    """Bytes of a search for the largest of so many features, beside what it finds."""
    if not on_card:
        return SEARCH_MEMORY
    # Rows of other widths are copied into those of a multiple.
    padded = features * (width + 64) * 4 if width % 64 else 0
    return min(CARD_SEARCH, rows * features // 2) + padded


def descending(tree: Tree, features: int, width: int, rows: int) -> int:
    """Bytes of scores of children and of what is kept of them, and of a copy of the parents."""
    searched = (tree.routed or 0) + tree.always
    return min(rows * searched * tree.children, 2**26) * 16 + features // tree.size * width * 4


def coding(dictionary: Dictionary, features: int, width: int, rows: int, on_card: bool = False) -> int:
    """Bytes that encoding takes beside the dictionary: a block of the search, candidates and codes of the rows.

    Args:
        dictionary: The manifest's.
        features: F.
        width: D.
        rows: That are encoded at one time.
        on_card: On a GPU.
    """
    tree, k = dictionary.tree, dictionary.k
    active = firing(dictionary.activation, k, features)
    taken = searching(features // (tree.size if tree else 1), width, rows, on_card) + rows * active * 64
    return taken + (descending(tree.resolved(k), features, width, rows) if tree else 0)


class Footprint(NamedTuple):
    """Of weights and what belongs to them.

    `weights` are those of the whole dictionary as it is saved, `state` has the optimizer's memory as well, as a
    checkpoint has it; `peak` is what a rank holds of both at once, at worst. Where it has a GPU, `card` is what lies
    there, and `host` what is in the machine's memory meanwhile.
    """

    weights: int
    state: int
    peak: int
    card: int
    host: int


def footprint(train: Train, compute: Compute, features: int, width: int) -> Footprint:
    """What training takes.

    A rank steps, while a checkpoint is packed (its part of the state as tensors, and a piece of that as bytes, which
    safetensors has twice for a moment); or it goes on from one, which it has as bytes and as tensors beside the
    dictionary; or it makes the first step behind that, and the engine takes over the optimizer's memory.

    Args:
        train: The manifest's `train`.
        compute: The manifest's `compute`.
        features: F.
        width: Numbers of a feature's encoder and decoder rows together.
    """
    numbers = (width + 1) * features
    dense = train.optimizer == "adam"
    low = 2 if train.weights == "bfloat16" else 4
    # Biases are float32 everywhere, and dense Adam's weights are saved as it moves them.
    weights = 4 * numbers if dense else (low * width + 4) * features
    moments = 4 * numbers * (2 if dense else 1)
    if train.row_wise:
        moments = 16 * features
    if train.beta1 and not dense:
        moments += (low * width + 4) * features
    state = weights + moments
    parts = compute.sharding.features
    near, far = _dense(numbers, low, compute) if dense else (state // parts, 0)
    kept = near + far
    gathered = 4 * numbers // 2 if dense and compute.zero.stage else 0
    part = state // compute.sharding.ranks
    packed = part + 2 * min(part, PIECE_BYTES)
    resuming = weights // parts + 2 * state // parts
    peak = max(kept + gathered + packed, resuming, kept + state // parts)
    # The dictionary is put together on rank 0, from one part of the checkpoint after the other.
    whole = 3 * weights + 2 * (weights + state) // parts if parts > 1 else 0
    return Footprint(weights, state, peak + whole, near + gathered, far + max(packed, resuming) + whole)


def _dense(numbers: int, low: int, compute: Compute) -> tuple[int, int]:
    """Weights, gradients and the optimizer's memory in a step: where it computes, and what it offloads from there.

    Without ZeRO a rank has a gradient and two moments beside the weights, and sends a copy of the gradient. ZeRO
    keeps a share of weights, moments and gradients in float32, and a gradient that is being moved. In stage 1 a whole
    gradient waits for the step, in several copies; afterwards only that of encoder or decoder exists at once. In stage
    3 weights are shared between passes, but a pass needs all of them. How many copies of gradients DeepSpeed makes, and
    how many more where it offloads, has been measured.
    """
    stage, ranks = compute.zero.stage, compute.sharding.data
    whole = 4 * numbers
    if not stage:
        return whole * (5 if ranks > 1 else 4), 0
    gradients = 4 * whole if stage == 1 else whole // 2
    moved = 5 * whole // ranks
    # The weights as they were before they were rounded, until the first step, and float32 of what is bfloat16.
    rounded = 5 * whole // 2 if low == 2 else 0
    near = numbers * low + gradients + rounded
    return (near, moved + 3 * whole) if compute.zero.offload == "cpu" else (near + moved, 0)
