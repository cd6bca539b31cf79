"""`compute.sharding: auto`, turned into the mesh that a run is trained on."""

from __future__ import annotations

from collections.abc import Callable

from cluster.devices import Devices, of_cluster, of_machine
from pipeline.stage import Sources
from pipeline.stages import STAGES
from schemas.compute import Compute, Sharding
from schemas.errors import ManifestError
from schemas.manifest import Manifest


def resolved(manifest: Manifest, sources: Sources, devices: Callable[[Compute], Devices] | None = None) -> Manifest:
    """The manifest with a mesh in it. A result does not depend on it, beyond rounding.

    As few ranks share the features as have room for their part of every dictionary, because each of them sees the whole
    batch; all others share the batch.

    Args:
        manifest: Any.
        sources: The model and the corpus.
        devices: What there is to train on; found out if left out.

    Raises:
        ManifestError: there is no device, or it does not say how much memory it has.
        BusyError: the cluster does not answer.
    """
    if not manifest.compute.sharding.auto:
        return manifest
    compute = manifest.compute
    found = (devices or _found)(compute)
    if found.count == 0:
        raise ManifestError(
            f"compute.sharding auto: nothing has {compute.rank_gpus:g} GPUs and {compute.rank_threads} CPUs for a rank",
            "set compute.gpus to 0 or lower compute.rank_threads",
        )
    memory = (compute.gpu_memory if compute.gpus else compute.memory) or found.memory
    if memory is None:
        raise ManifestError(
            "compute.sharding auto: Ray does not say how much memory a GPU of the cluster has",
            "set compute.gpu_memory to that of one, or compute.sharding.features and data",
        )
    every = [_mesh(manifest, sources, parts, found.count) for parts in range(1, found.count + 1)]
    meshes = [mesh for mesh in every if mesh is not None]
    for mesh in meshes:
        chosen = with_mesh(manifest, mesh)
        if _bytes_per_rank(chosen, sources) <= memory:
            return chosen
    # That it does not fit either is said where all sizes are compared.
    return with_mesh(manifest, meshes[-1])


def largest(manifest: Manifest, sources: Sources, count: int) -> Sharding:
    """The mesh nearest to the manifest's with at most so many ranks, as many of them to share the features."""
    wanted = manifest.compute.sharding.features
    meshes = (_mesh(manifest, sources, parts, count) for parts in range(min(wanted, count), 0, -1))
    return next(mesh for mesh in meshes if mesh is not None)


def with_mesh(manifest: Manifest, mesh: Sharding) -> Manifest:
    """The same manifest on another mesh."""
    return manifest.model_copy(update={"compute": manifest.compute.model_copy(update={"sharding": mesh})})


def _mesh(manifest: Manifest, sources: Sources, parts: int, count: int) -> Sharding | None:
    """The largest mesh with so many feature ranks on which every dictionary can be trained."""
    for dictionary in manifest.dictionaries:
        subtree = 1 if dictionary.tree is None else dictionary.tree.size
        if dictionary.size(sources.model.widths[dictionary.encoded]) % (parts * subtree):
            return None
        if parts > 1 and dictionary.train.optimizer == "adam":
            return None
    data = count // parts
    while any(dictionary.train.batch % (data * manifest.compute.accumulate) for dictionary in manifest.dictionaries):
        data -= 1
    return Sharding(features=parts, data=data)


def _bytes_per_rank(manifest: Manifest, sources: Sources) -> int:
    (train,) = [stage for stage in STAGES if stage.name == "train"]
    every = [train.estimate(manifest, dictionary, sources) for dictionary in manifest.wanted]
    return max(each.card if manifest.compute.gpus else each.memory for each in every)


def _found(compute: Compute) -> Devices:
    if compute.pool == "inline":
        return Devices(1, of_machine(0).memory)
    if compute.address is None:
        return of_machine(compute.rank_gpus)
    return of_cluster(compute.address, compute.rank_gpus, compute.rank_threads)
