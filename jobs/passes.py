"""Which dictionaries are trained together, in one pass of the store. What comes of each does not depend on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from jobs.room import Room
from pipeline.device import CARD_MEMORY
from pipeline.stage import Estimate, Sources, Stage
from schemas.manifest import Dictionary, Manifest


def companions(
    stage: Stage,
    dictionary: Dictionary | None,
    manifest: Manifest,
    sources: Sources,
    is_open: Callable[[Dictionary], bool],
) -> list[Dictionary]:
    """The dictionaries behind this one whose stage runs together with its own: as many as there is room for.

    Args:
        stage: What is to run.
        dictionary: Whose.
        manifest: All of them.
        sources: The model and the corpus.
        is_open: Whether a dictionary's stage is still to be run.
    """
    if stage.together is None or dictionary is None or not manifest.compute.share_reads:
        return []
    room = Room.of(manifest.compute)
    key = stage.together.key(stage.params(manifest, dictionary, sources))
    taken, estimate = list[Dictionary](), stage.estimate(manifest, dictionary, sources)
    for other in manifest.wanted[manifest.wanted.index(dictionary) + 1 :]:
        if stage.together.key(stage.params(manifest, other, sources)) != key or not is_open(other):
            continue
        both = joint(estimate, stage.estimate(manifest, other, sources))
        if _is_known(room, manifest) and room.holds(both, manifest):
            taken.append(other)
            estimate = both
    return taken


def joint(one: Estimate, other: Estimate) -> Estimate:
    """What `one` takes when `other` runs together with it."""
    card = one.card + other.card - min(CARD_MEMORY, other.card)
    return replace(one, memory=one.memory + other.memory - other.shared, card=card)


def _is_known(room: Room, manifest: Manifest) -> bool:
    """Whether anybody knows how much there is where the ranks compute: what may not fit is not added."""
    return (room.card if manifest.compute.gpus else room.memory) is not None
