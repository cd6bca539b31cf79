"""How work is fanned out: the two verbs that the pipeline knows, and the pool that needs no cluster.

Nothing bulky passes through a pool. A task is a small value, a result a small record; data goes through
the store.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from schemas.events import Event


@dataclass(frozen=True, slots=True)
class Resources:
    """What one worker needs. `threads` is also how many threads torch may use in it."""

    threads: int = 1
    gpus: float = 0.0


@dataclass(frozen=True, slots=True)
class Rank:
    """A gang member's place: `init_method` is where torch.distributed meets."""

    rank: int
    world_size: int
    init_method: str
    emit: Callable[[Event], None]


class Pool(Protocol):
    """Somewhere to run functions."""

    def map(
        self,
        fn: Callable[[Any], Any],
        tasks: Sequence[Any],
        resources: Resources,
        emit: Callable[[Event], None],
        stage: str,
    ) -> Iterator[tuple[int, Any]]:
        """Yield (index, fn(task)) in order of completion. A worker that dies is replaced and its task rerun.

        Raises:
            StageFailedError: workers died more often than the pool may replace them.
            Exception: whatever `fn` raised.
        """

    def gang(
        self,
        fn: Callable[[Rank], Any],
        world_size: int,
        resources: Resources,
        emit: Callable[[Event], None],
        stage: str,
    ) -> Any:
        """Run `fn` on `world_size` workers at once; when one dies all are stopped and started again.

        Returns:
            What rank 0 returned.
        """

    def close(self) -> None:
        """Give everything back."""


def free_port() -> int:
    """A TCP port of this machine's loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def limit_threads(threads: int) -> None:
    """Hold this process to so many CPU threads. The environment matters only to libraries loaded later."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)


class InlinePool:
    """Runs everything here, one after another: for tests and for a debugger. Gangs have one rank."""

    def map(
        self,
        fn: Callable[[Any], Any],
        tasks: Sequence[Any],
        resources: Resources,
        emit: Callable[[Event], None],
        stage: str,
    ) -> Iterator[tuple[int, Any]]:
        """See `Pool.map`."""
        limit_threads(resources.threads)
        for index, task in enumerate(tasks):
            yield index, fn(task)

    def gang(
        self,
        fn: Callable[[Rank], Any],
        world_size: int,
        resources: Resources,
        emit: Callable[[Event], None],
        stage: str,
    ) -> Any:
        """See `Pool.gang`.

        Raises:
            ValueError: more than one rank was asked for.
        """
        if world_size != 1:
            raise ValueError(f"the inline pool has 1 rank, {world_size} were asked for")
        limit_threads(resources.threads)
        return fn(Rank(0, 1, f"tcp://127.0.0.1:{free_port()}", emit))

    def close(self) -> None:
        """Nothing to give back."""
