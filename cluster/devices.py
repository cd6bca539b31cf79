"""What there is to train on: how many ranks have a device of their own, and how much memory each has."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from cluster.ray_cluster import machines


@dataclass(frozen=True, slots=True)
class Devices:
    """`count` of them with at least `memory` bytes each; None where nobody says how much."""

    count: int
    memory: int | None


def machine_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or the container's if that is less."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text("ascii").strip()
    except OSError:
        return physical
    return min(physical, int(limit)) if limit.isdigit() else physical


def of_machine(gpus: float) -> Devices:
    """Those of this machine.

    Args:
        gpus: GPUs of one rank; 0 for none, and then one rank has all of the machine.
    """
    if gpus == 0:
        return Devices(1, machine_memory())
    import torch

    sizes = [torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())]
    return Devices(int(len(sizes) // gpus), min(sizes, default=0))


def of_cluster(address: str, gpus: float, threads: int) -> Devices:
    """Those of a Ray cluster: its GPUs, or its machines where a rank has none.

    Args:
        address: Of the cluster.
        gpus: GPUs of one rank.
        threads: CPUs of one rank.

    Raises:
        BusyError: the cluster does not answer.
    """
    nodes = machines(address)
    if gpus:
        return Devices(sum(int(node.get("GPU", 0) // gpus) for node in nodes), None)
    large = [int(node["memory"]) for node in nodes if node.get("CPU", 0) >= threads]
    return Devices(len(large), min(large, default=0))
