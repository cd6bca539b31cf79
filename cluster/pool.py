"""How work is fanned out: the two verbs that the pipeline knows, and the pool that needs no cluster.

Nothing bulky passes through a pool. A task is a small value, a result a small record; data goes through
the store.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from cluster import interruption, rendezvous
from cluster.backlog import Backlog
from cluster.failures import ATTEMPTS, Tries
from schemas.events import Event

# What a rank is doing: importing and loading, meeting the others, waiting for data, in a step with all the others,
# writing to the store.
Phase = Literal["starting", "meeting", "data", "step", "saving"]


@dataclass(frozen=True, slots=True)
class Resources:
    """What one worker needs. `threads` is also how many threads torch may use in it.

    `together` is how many neighbouring ranks of a gang exchange most, and should share a machine.
    """

    threads: int = 1
    gpus: float = 0.0
    together: int = 1


@dataclass(frozen=True, slots=True)
class Rank:
    """A gang member's place: `init_method` is where torch.distributed meets.

    `beat(step, phase)` says what the rank does from now on. It costs nothing, and is how a hanging rank is
    told from a patient one: call it whenever the answer changes. `leaving()` says that a machine of the gang is
    being taken away: ranks that agree on it save, and raise `LeftError`.
    """

    rank: int
    world_size: int
    init_method: str
    emit: Callable[[Event], None]
    beat: Callable[[int, Phase], None]
    leaving: Callable[[], bool]


class Pool(Protocol):
    """Somewhere to run functions."""

    def map(
        self,
        fn: Callable[[Any], Any],
        tasks: Sequence[Any],
        resources: Resources,
        emit: Callable[[Event], None],
        stage: str,
        name: Callable[[Any], str] = str,
    ) -> Iterator[tuple[int, Any]]:
        """Yield (index, fn(task)) in order of completion, each once. `name` is what people call a task.

        A worker that is lost is replaced without end, ever more slowly, and its task run again. One whose machine is
        being taken away ends the task that it has, and gets no more. A task that
        raises is tried again a few times, one whose worker crashes five times in a row is not; then it is
        quarantined and the others go on. One that does not end in time has its worker killed, and counts as raised.

        Raises:
            StageFailedError: every other task is done, and these are quarantined.
            KilobasisError: a task raised it. That is certain, so it comes at once: a task in flight may take
                minutes, and running it again costs no more than any other stop does.
            BusyError: no worker started in time.
        """

    def gang(
        self,
        fn: Callable[[Rank], Any],
        world_size: int,
        resources: Resources,
        emit: Callable[[Event], None],
        stage: str,
    ) -> Any:
        """Run `fn` on `world_size` workers at once, all or nothing.

        When a rank dies, falls silent, hangs or raises, all are killed and started again: without end where a node
        was lost or a checkpoint (`CheckpointCommitted`) was committed in between. When a machine of it is being
        taken away, all save and leave, and are started again on others.

        Returns:
            What rank 0 returned.

        Raises:
            StageFailedError: the gang failed five times in a row without a new checkpoint, and no node was lost.
            KilobasisError: a rank raised it.
            BusyError: there was no room for all ranks in time.
        """

    def close(self) -> None:
        """Give everything back."""


def limit_threads(threads: int) -> None:
    """Hold this process to so many CPU threads: libraries loaded later by the environment, and torch, if it is here."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)


def _beat(_step: int, _phase: Phase) -> None:
    """Nobody watches a gang that is not apart; but here it may be stopped."""
    interruption.check()


def _stays() -> bool:
    """The machine that everything is on goes with the run."""
    return False


class InlinePool:
    """Runs everything here, one after another: for tests and for a debugger. Gangs have one rank.

    Args:
        attempts: How often a task that raises is tried.
    """

    def __init__(self, attempts: int = ATTEMPTS) -> None:
        self._attempts = attempts

    def map(
        self,
        fn: Callable[[Any], Any],
        tasks: Sequence[Any],
        resources: Resources,
        emit: Callable[[Event], None],
        stage: str,
        name: Callable[[Any], str] = str,
    ) -> Iterator[tuple[int, Any]]:
        """See `Pool.map`."""
        limit_threads(resources.threads)
        tries = Tries(stage, len(tasks), self._attempts, emit)
        waiting, backlog = deque(enumerate(tasks)), Backlog(stage, emit)
        while waiting:
            interruption.check()
            index, task = waiting.popleft()
            backlog.at(len(waiting), 1)
            try:
                result = fn(task)
            except Exception as error:  # noqa: BLE001 - counted, told, and in the end raised
                if tries.raised(name(task), error, traceback.format_exc()):
                    waiting.append((index, task))
                continue
            tries.done()
            yield index, result
        backlog.at(0, 0)
        tries.settle()

    def gang(
        self,
        fn: Callable[[Rank], Any],
        world_size: int,
        resources: Resources,
        emit: Callable[[Event], None],
        stage: str,
    ) -> Any:
        """See `Pool.gang`. What the rank raises is raised as it is: a debugger wants to see it.

        Raises:
            ValueError: more than one rank was asked for.
        """
        if world_size != 1:
            raise ValueError(f"the inline pool has 1 rank, {world_size} were asked for")
        limit_threads(resources.threads)
        meeting = rendezvous.hold("127.0.0.1")
        try:
            return fn(Rank(0, 1, meeting, emit, _beat, _stays))
        finally:
            rendezvous.release(meeting)

    def close(self) -> None:
        """Nothing to give back."""
