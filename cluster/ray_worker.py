"""A worker process on Ray, from its start to its end. Ray's own retries are off: who is lost is noticed here.

Nothing waits on Ray without a deadline, and nothing outlives the run: who is dismissed is killed, a stopped
process too (its raylet follows with SIGKILL after five seconds; on this machine the driver does at once), and a
worker whose raylet is gone ends itself.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.actor import ActorHandle
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    GetTimeoutError,
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from cluster import interruption, rendezvous
from cluster.failures import Reminder, first_line
from cluster.pool import Resources, limit_threads
from cluster.processes import birth
from cluster.storage import create
from cluster.storage.redaction import redact
from schemas.errors import BusyError, StageFailedError
from schemas.events import Event, Note

POLL_SECONDS = 0.5
START_SECONDS = 180.0
START_TELL_SECONDS = 15.0
TELL_SECONDS = 60.0
# For an answer that is there already, and only has to be fetched.
FETCH_SECONDS = 30.0
# What a stop leaves a worker to finish the object that it is writing.
FINISH_SECONDS = 2.0
# For a dismissed worker to end itself; then it is killed.
OBEY_SECONDS = 1.0
# For a killed process to be gone.
GONE_SECONDS = 10.0

# Set in a worker whose gang is to leave its machines.
leaving = threading.Event()

_ORPHAN_CODE = 70
_FROM_OUTSIDE = ("node has died", "process receives a SIGTERM")


class Worker:
    """Runs tasks in a process of its own, which keeps what it has loaded. The second thread answers meanwhile."""

    def __init__(self, threads: int) -> None:
        threading.Thread(target=_end_with, args=(os.getppid(),), name="raylet", daemon=True).start()
        self._threads = threads
        limit_threads(threads)

    def place(self) -> Place:
        """Where this process is. Its first call also tells that it has started."""
        process = psutil.Process()
        return Place(
            ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address(), process.pid, birth(process)
        )

    def meeting_point(self) -> str:
        """Where a gang led by this worker meets. Nobody else gets there first: it is held from now on."""
        return rendezvous.hold(ray.util.get_node_ip_address())

    def run(self, fn: Callable[..., Any], *args: Any) -> Any:
        """Call a function."""
        # It has brought torch along by now, where it uses that.
        limit_threads(self._threads)
        return fn(*args)

    @ray.method(concurrency_group="beside")  # type: ignore[untyped-decorator]
    def alive(self) -> bool:
        """Answers whatever `run` does."""
        return True

    @ray.method(concurrency_group="beside")  # type: ignore[untyped-decorator]
    def leave(self) -> None:
        """Put the work down behind the next commit: a machine of the gang is being taken away."""
        leaving.set()

    @ray.method(concurrency_group="beside")  # type: ignore[untyped-decorator]
    def finish(self, seconds: float) -> None:
        """Begin no new object, and wait for the one that is being written."""
        create.finish(seconds)


@dataclass(frozen=True, slots=True)
class Place:
    """A process of the cluster. `started` tells it from another one that gets its number later."""

    node: str
    host: str
    pid: int
    started: float

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host}"


@dataclass(frozen=True, slots=True)
class Returned:
    """A call came back with a value."""

    value: Any


@dataclass(frozen=True, slots=True)
class Raised:
    """A call raised by itself."""

    error: BaseException
    traceback: str


@dataclass(frozen=True, slots=True)
class Gone:
    """The worker of a call is lost. `crashed` if its process died by itself, for all that Ray can tell.

    Ray knows of nodes that died, of SIGTERM, and of exit codes. It cannot tell SIGKILL by somebody's hand from a
    crash or from the kernel's want of memory, and the work itself may cause those two.
    """

    error: BaseException
    reason: str
    crashed: bool


def hire(resources: Resources, where: Any = "DEFAULT") -> ActorHandle[Any]:
    """Ask for a worker. It starts when there is room for it.

    Args:
        resources: What it needs.
        where: Ray's scheduling strategy. By default Ray keeps who needs no GPU off machines that have some, as long as
            others have room.
    """
    options = {
        "num_cpus": resources.threads,
        "num_gpus": resources.gpus,
        "max_restarts": 0,
        "max_task_retries": 0,
        "scheduling_strategy": where,
    }
    kind = ray.remote(concurrency_groups={"beside": 1})(Worker)
    actor: ActorHandle[Any] = kind.options(**options).remote(resources.threads)
    return actor


def fetch(reference: Any) -> Returned | Raised | Gone:
    """What came of a call that has ended."""
    try:
        return Returned(ray.get(reference, timeout=FETCH_SECONDS))
    except RayTaskError as error:
        # The user's errors are ours to show, without Ray's around them. Its text is the worker's traceback, in colour.
        return Raised(error.cause, re.sub(r"\x1b\[[0-9;]*m", "", str(error)))
    except (ActorDiedError, WorkerCrashedError, OutOfMemoryError) as error:
        # Ray tells them apart in words only. Were the words to change, all would count as crashes.
        outside = getattr(error, "preempted", False) or any(words in str(error) for words in _FROM_OUTSIDE)
        return Gone(error, why(error), crashed=not outside)
    except (
        ActorUnavailableError, RayActorError, NodeDiedError, LocalRayletDiedError, ObjectLostError, GetTimeoutError
    ) as error:  # fmt: skip
        return Gone(error, why(error), crashed=False)
    except RayError as error:
        # For example a value that cannot be read here: more of the same worker's would not help.
        return Raised(error, str(error))


def started(reference: Any) -> Place | Gone:
    """What came of a worker's first call.

    Raises:
        StageFailedError: workers cannot start here at all.
    """
    outcome = fetch(reference)
    if isinstance(outcome, Returned):
        place: Place = outcome.value
        return place
    if isinstance(outcome, Raised) or getattr(outcome.error, "actor_init_failed", False):
        raise StageFailedError(
            f"a worker cannot start: {str(outcome.error).strip().splitlines()[-1]}",
            "install the same Python packages on every node of the cluster",
        ) from outcome.error
    return outcome


def require_node() -> None:
    """After a loss: make sure that it was not this process's own node. Nobody could be hired from it any more.

    Raises:
        BusyError: it is gone.
    """
    here = ray.get_runtime_context().get_node_id()
    if any(node["NodeID"] == here and not node["Alive"] for node in ray.nodes()):
        raise BusyError(
            "Ray on this machine has died (its raylet is gone), so no worker can be started any more",
            "look for what killed it (memory, for example), then resume: everything committed is kept",
        )


def wait_for(references: Sequence[Any], seconds: float) -> tuple[list[Any], list[Any]]:
    """Wait until all calls have ended, though no longer than that; (ended, not ended). A safe place to stop."""
    deadline = time.monotonic() + seconds
    while True:
        interruption.check()
        left = deadline - time.monotonic()
        done, running = ray.wait(
            list(references), num_returns=len(references), timeout=min(POLL_SECONDS, max(left, 0.0))
        )
        if not running or left <= 0:
            return done, running


def rest(seconds: float) -> None:
    """Let time pass. A safe place to stop."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        interruption.check()
        time.sleep(min(POLL_SECONDS, left))


def why(error: BaseException) -> str:
    """The sentences of Ray's error that say what happened, without names and advice."""
    lines = [line.strip() for line in redact(str(error)).splitlines()]
    telling = [line for line in lines if line.lower().startswith("the actor") and "unexpectedly before" not in line]
    text = " ".join(telling) or first_line(error)
    return text.partition(" Some common causes")[0][:300]


class Lobby:
    """Tells of workers that do not start: after 15 s, then every minute. Gives up where it is told to.

    Args:
        resources: What each of them needs.
        emit: Who is told.
        stage: Label for events.
    """

    def __init__(self, resources: Resources, emit: Callable[[Event], None], stage: str) -> None:
        self._resources, self._emit, self._stage = resources, emit, stage
        self._reminder = Reminder(START_TELL_SECONDS, TELL_SECONDS)

    def wait(self, missing: int, waited: float, left: float | None, lost: str = "") -> None:
        """Look at the time.

        Args:
            missing: Workers that have not started.
            waited: Seconds since they were asked for.
            left: Seconds until it is too late; None while others can work.
            lost: How the last worker was lost that had started.

        Raises:
            BusyError: it is too late.
        """
        last = f"; the last one was lost: {lost}" if lost else ""
        if left is not None and left <= 0:
            raise BusyError(
                f"{self._stage}: {missing} workers did not start within {START_SECONDS:.0f} s; {self._lack()}{last}",
                "lower compute.threads, rank_threads, sharding or gpus, or resume when it is free",
            )
        if self._reminder.due(waited):
            then = "the others go on" if left is None else f"giving up in {left:.0f} s"
            text = f"waiting for {missing} workers to start since {waited:.0f} s; {self._lack()}; {then}{last}"
            self._emit(Note(self._stage, text))

    def _lack(self) -> str:
        total, free = ray.cluster_resources(), ray.available_resources()
        kinds = [f"{total.get(kind, 0):g} {kind}s ({free.get(kind, 0):g} free)" for kind in ("CPU", "GPU")]
        wanted = f"{self._resources.threads} CPUs and {self._resources.gpus:g} GPUs"
        return f"each needs {wanted}, the cluster has {' and '.join(kinds)}"


def let_finish(actors: Sequence[ActorHandle[Any]]) -> None:
    """Before workers are killed in the middle of something: a moment to finish the object that they are writing."""
    with suppress(RayError):
        asked = [actor.finish.remote(FINISH_SECONDS) for actor in actors]
        if asked:
            ray.wait(asked, num_returns=len(asked), timeout=FINISH_SECONDS)


def dismiss(actors: Sequence[ActorHandle[Any]], places: Sequence[Place]) -> None:
    """Kill workers, and see to it that those on this machine are gone, the stopped ones too.

    Args:
        actors: Whom to kill.
        places: Where they are, as far as that is known.
    """
    for actor in actors:
        with suppress(RayError):
            ray.kill(actor)
    here = ray.get_runtime_context().get_node_id() if places else ""
    left = [process for place in places if place.node == here and (process := _process(place))]
    if not _gone(left, OBEY_SECONDS):
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        _gone(left, GONE_SECONDS)


def _gone(processes: Sequence[psutil.Process], seconds: float) -> bool:
    """Wait until all of them are, though no longer than that."""
    deadline = time.monotonic() + seconds
    while any(map(_runs, processes)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _process(place: Place) -> psutil.Process | None:
    """The process, if it is not gone yet."""
    try:
        process = psutil.Process(place.pid)
        return process if birth(process) == place.started else None
    except psutil.NoSuchProcess:
        return None


def _runs(process: psutil.Process) -> bool:
    """Whether it still runs. One that waits for its parent to hear of its end does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _end_with(parent: int) -> None:
    """End this process when its raylet is gone: nobody else would, and it might hold a GPU for good."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(_ORPHAN_CODE)
