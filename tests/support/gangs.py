"""Ranks of a gang as processes of their own."""

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as processes

from cluster import rendezvous
from pipeline.dictionary.ranks import Ranks


def meeting(host: str = "127.0.0.1") -> str:
    """Where a gang that is spawned next may meet. Until then somebody else may take it."""
    address = rendezvous.hold(host)
    rendezvous.release(address)
    return address


def next_meeting(ranks: Ranks) -> str:
    """Where a gang that is about to part meets again."""
    return ranks.texts(rendezvous.hold("127.0.0.1") if ranks.rank == 0 else "")[0]


def spawn(work: Callable[..., None], arguments: tuple[Any, ...], ranks: int) -> None:
    """Call `work(rank, *arguments)` in every rank, and wait.

    Raises:
        ProcessRaisedException: one of them raised.
        ProcessExitedException: one of them was killed.
    """
    # With GPUs each rank starts from nothing: CUDA does not outlive a fork.
    method = "spawn" if torch.cuda.is_available() else "forkserver"
    if method == "forkserver":
        processes.get_context(method).set_forkserver_preload(["tests.support.gang_libraries"])
    processes.start_processes(_rank, (dict(os.environ), work, arguments), nprocs=ranks, start_method=method)


def _rank(rank: int, environment: dict[str, str], work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    work(rank, *arguments)
    # See `parallel.joined`: a test's own variables know of the gang as well, until now.
    gc.collect()
    if threads_of_gloo():
        # DeepSpeed's stage 3 never lets go of its group. Nothing is left to do, and nothing may end it otherwise.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def threads_of_gloo() -> list[str]:
    """Threads of this process that send and receive tensors."""
    if sys.platform != "linux":
        return []
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    return [name for name in names if "gloo" in name]
