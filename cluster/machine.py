"""What a machine says of itself: what is installed there, and what there is to work with. Nothing of Ray."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from cluster.devices import machine_memory
from cluster.storage.redaction import first_line

PACKAGES = ("cluster", "jobs", "pipeline", "schemas")


@dataclass(frozen=True, slots=True)
class Versions:
    """What has to agree for a run to be one run. `code` is a digest of our own modules."""

    python: str
    ray: str
    torch: str
    code: str


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU: bytes of memory, and why torch cannot compute on it; empty if it can."""

    name: str
    memory: int
    wrong: str


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine, as one of its processes sees it.

    Attributes:
        versions: Of what is installed.
        memory: Bytes that all processes together may use.
        free_memory: Of those, what is free now.
        scratch: Where temporary files go.
        free_scratch: Bytes that are free there.
        gpus: Those that torch sees; none where they were not asked for.
    """

    versions: Versions
    memory: int
    free_memory: int
    scratch: str
    free_scratch: int
    gpus: tuple[Gpu, ...] = ()


def examine(gpus: bool) -> Machine:
    """This machine.

    Args:
        gpus: Whether its GPUs are of interest. To try them takes a moment and some of their memory.
    """
    scratch = tempfile.gettempdir()
    free = shutil.disk_usage(scratch).free
    memory = machine_memory()
    available = min(psutil.virtual_memory().available, memory)
    return Machine(versions(), memory, available, scratch, free, _gpus() if gpus else ())


def versions() -> Versions:
    """Of this process."""
    return Versions(platform.python_version(), _installed("ray"), _installed("torch"), code_digest())


def code_digest() -> str:
    """Twelve hex digits that are equal where our modules are. Compiled kernels are each machine's own."""
    home, made = Path(__file__).parents[1], hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((home / package).rglob("*.py")):
            inner = path.relative_to(home)
            # Examples come along with some ways of installing, and not with others.
            if "manifests" not in inner.parts:
                body = path.read_bytes()
                made.update(f"{inner.as_posix()}\0{len(body)}\0".encode() + body)
    return made.hexdigest()[:12]


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _gpus() -> tuple[Gpu, ...]:
    # Ray hides all GPUs from a worker that was given none, unless it is told not to.
    if "torch" not in sys.modules and os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        del os.environ["CUDA_VISIBLE_DEVICES"]
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        name, memory, wrong = f"GPU {index}", 0, ""
        try:
            properties = torch.cuda.get_device_properties(index)
            name, memory = properties.name, properties.total_memory
            # A build for other GPUs sees this one, and fails only here.
            torch.ones(8, device=f"cuda:{index}").sum().item()
        except torch.cuda.OutOfMemoryError:
            # Somebody is at work there. It can compute.
            pass
        except RuntimeError as error:
            wrong = first_line(str(error), 160)
        found.append(Gpu(name, memory, wrong))
    return tuple(found)
