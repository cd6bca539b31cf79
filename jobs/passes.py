"""Which dictionaries are trained together, in one pass of the store. What comes of each does not depend on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from cluster.devices import machine_memory, of_machine
from pipeline.stage import Estimate, Sources, Stage
from schemas.compute import Compute
from schemas.manifest import Dictionary, Manifest

# Measured: the driver with torch, transformers and ray imported, and the processes of a local Ray.
DRIVER_MEMORY = 900 * 2**20
RAY_MEMORY = 700 * 2**20


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
    room = _room(manifest.compute)
    key = stage.together.key(stage.params(manifest, dictionary, sources))
    taken, estimate = list[Dictionary](), stage.estimate(manifest, dictionary, sources)
    for other in manifest.wanted[manifest.wanted.index(dictionary) + 1 :]:
        if stage.together.key(stage.params(manifest, other, sources)) != key or not is_open(other):
            continue
        both = joint(estimate, stage.estimate(manifest, other, sources))
        if room is not None and needed(both, manifest) <= room:
            taken.append(other)
            estimate = both
    return taken


def joint(one: Estimate, other: Estimate) -> Estimate:
    """What `one` takes when `other` runs together with it."""
    return replace(one, memory=one.memory + other.memory - other.shared)


def needed(estimate: Estimate, manifest: Manifest) -> int:
    """Bytes on one machine: here all workers are, on a cluster every one may have its own."""
    workers = estimate.workers if manifest.compute.address is None else 1
    return estimate.memory * workers + overhead(manifest)


def overhead(manifest: Manifest) -> int:
    """Bytes that everything but the workers takes on this machine."""
    return (DRIVER_MEMORY + RAY_MEMORY) if manifest.compute.address is None and manifest.compute.pool == "ray" else 0


def _room(compute: Compute) -> int | None:
    """Bytes that what runs together may take; None where nobody knows how much there is."""
    if compute.memory is not None:
        return compute.memory
    if compute.address is not None:
        return None
    return of_machine(compute.rank_gpus).memory if compute.gpus else machine_memory()
