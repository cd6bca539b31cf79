"""How much memory there is, on a machine and on its GPUs, and whether a stage has room in it."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.devices import machine_memory, of_machine
from pipeline.stage import Estimate
from schemas.compute import Compute
from schemas.manifest import Manifest

# Measured: the driver with torch, transformers and ray imported, and the processes of a local Ray.
DRIVER_MEMORY = 900 * 2**20
RAY_MEMORY = 700 * 2**20


@dataclass(frozen=True, slots=True)
class Room:
    """What a run may take.

    Attributes:
        memory: Bytes on a machine; None where those of a cluster say so themselves, once it is joined.
        card: Bytes of one GPU; None where none is used, or where nobody can say how much it has.
        ranks: Training ranks for which there is a GPU each; None where that is not known.
    """

    memory: int | None
    card: int | None = None
    ranks: int | None = None

    @classmethod
    def of(cls, compute: Compute) -> Room:
        """As far as it is known before a cluster is joined."""
        here = compute.address is None or compute.pool == "inline"
        memory = compute.memory if compute.memory is not None or not here else machine_memory()
        if not compute.gpus:
            return cls(memory)
        # Without any here, a plan is made for another machine.
        found = of_machine(compute.rank_gpus) if here else None
        if found is None or not found.count:
            return cls(memory, compute.gpu_memory)
        return cls(memory, compute.gpu_memory or found.memory, found.count)

    def holds(self, estimate: Estimate, manifest: Manifest) -> bool:
        """Whether a stage of a manifest has room."""
        enough = self.memory is None or needed(estimate, manifest) <= self.memory
        return enough and self.holds_card(estimate)

    def holds_card(self, estimate: Estimate) -> bool:
        """Whether what lies on its GPUs has room there."""
        return self.card is None or estimate.card <= self.card * estimate.gpus

    def seats(self, manifest: Manifest) -> bool:
        """Whether every training rank has a GPU for itself."""
        return self.ranks is None or manifest.compute.sharding.ranks <= self.ranks


def needed(estimate: Estimate, manifest: Manifest) -> int:
    """Bytes on one machine: here all workers are, on a cluster every one may have its own."""
    workers = estimate.workers if manifest.compute.address is None else 1
    return estimate.memory * workers + overhead(manifest)


def overhead(manifest: Manifest) -> int:
    """Bytes that everything but the workers takes on this machine."""
    return (DRIVER_MEMORY + RAY_MEMORY) if manifest.compute.address is None and manifest.compute.pool == "ray" else 0
