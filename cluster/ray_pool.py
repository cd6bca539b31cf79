"""A pool on Ray: long-lived worker actors, one task in flight each, nothing bulky in the object store.

Ray's own retries are off. An actor that dies is noticed here, counted, and its task given to a new one;
that is safe because a task commits its unit itself, outside Ray, and a committed unit is not run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError, WorkerCrashedError

from cluster.pool import Rank, Resources, free_port, limit_threads
from schemas.errors import BusyError, StageFailedError
from schemas.events import Event, WorkerLost

START_SECONDS = 180.0
POLL_SECONDS = 0.5
# Once one rank has failed the others fail too; so long to see whether any of them died.
SETTLE_SECONDS = 5.0

_SYSTEM_FAILURES = (RayActorError, WorkerCrashedError)


class _Worker:
    """Runs tasks in a process of its own, which keeps what it has loaded."""

    def __init__(self, threads: int) -> None:
        limit_threads(threads)

    def ready(self) -> bool:
        return True

    def meeting_point(self) -> str:
        """Where a gang led by this worker meets."""
        return f"tcp://{ray.util.get_node_ip_address()}:{free_port()}"

    def run(self, fn: Callable[[Any], Any], task: Any) -> Any:
        return fn(task)


class _Mailbox:
    """Carries the events of a gang to the driver."""

    def __init__(self) -> None:
        self._events: list[Event] = []

    def push(self, event: Event) -> None:
        self._events.append(event)

    def drain(self) -> list[Event]:
        drained, self._events = self._events, []
        return drained


class _Post:
    """A rank's end of the mailbox."""

    def __init__(self, mailbox: ActorHandle[Any]) -> None:
        self._mailbox = mailbox

    def __call__(self, event: Event) -> None:
        self._mailbox.push.remote(event)


class RayPool:
    """See `cluster.pool.Pool`. Needs an open `ray_session`.

    Args:
        workers: Workers of `map`.
        retries: Dead workers that are replaced before a stage is given up.
    """

    def __init__(self, workers: int, retries: int) -> None:
        self._workers, self._retries = workers, retries
        self._actors: list[ActorHandle[Any]] = []
        self._staffed: tuple[str, Resources] | None = None

    def map(
        self,
        fn: Callable[[Any], Any],
        tasks: Sequence[Any],
        resources: Resources,
        emit: Callable[[Event], None],
        stage: str,
    ) -> Iterator[tuple[int, Any]]:
        """See `Pool.map`."""
        waiting = list(range(len(tasks)))[::-1]
        flying: dict[Any, tuple[int, ActorHandle[Any]]] = {}
        lost = 0
        try:
            for actor in self._staff(stage, min(self._workers, len(tasks)), resources):
                _send(flying, actor, fn, tasks, waiting)
            while flying:
                done, _ = ray.wait(list(flying), num_returns=1, timeout=POLL_SECONDS)
                for reference in done:
                    index, actor = flying.pop(reference)
                    try:
                        result = _get(reference)
                    except _SYSTEM_FAILURES as error:
                        lost += 1
                        reason = _first_line(error)
                        emit(WorkerLost(stage, reason, lost))
                        if lost > self._retries:
                            raise StageFailedError(
                                f"{stage}: {lost} workers died, the last one at task {index} ({reason})",
                                "look for lack of memory, then resume; or raise compute.retries",
                            ) from error
                        self._actors.remove(actor)
                        self._actors.append(_actor(_Worker, resources))
                        waiting.append(index)
                        _send(flying, self._actors[-1], fn, tasks, waiting)
                        continue
                    _send(flying, actor, fn, tasks, waiting)
                    yield index, result
        except BaseException:
            self.close()
            raise

    def _staff(self, stage: str, count: int, resources: Resources) -> list[ActorHandle[Any]]:
        """Workers for a stage. Those of an earlier call in the same stage have loaded what they need, and stay."""
        if self._staffed != (stage, resources):
            self.close()
        self._staffed = (stage, resources)
        while len(self._actors) < count:
            self._actors.append(_actor(_Worker, resources))
        _await_first(self._actors, resources)
        return self._actors[:count]

    def gang(
        self,
        fn: Callable[[Rank], Any],
        world_size: int,
        resources: Resources,
        emit: Callable[[Event], None],
        stage: str,
    ) -> Any:
        """See `Pool.gang`."""
        self.close()
        lost = 0
        while True:
            try:
                return self._gang_once(fn, world_size, resources, emit)
            except _SYSTEM_FAILURES as error:
                lost += 1
                reason = _first_line(error)
                emit(WorkerLost(stage, reason, lost))
                if lost > self._retries:
                    raise StageFailedError(
                        f"{stage}: ranks died {lost} times, the last time: {reason}",
                        "look for lack of memory, then resume; or raise compute.retries",
                    ) from error

    def _gang_once(
        self,
        fn: Callable[[Rank], Any],
        world_size: int,
        resources: Resources,
        emit: Callable[[Event], None],
    ) -> Any:
        mailbox = ray.remote(_Mailbox).options(num_cpus=0).remote()
        actors = [_actor(_Worker, resources) for _ in range(world_size)]
        try:
            _await_all(actors, resources)
            meeting = ray.get(actors[0].meeting_point.remote(), timeout=START_SECONDS)
            post = _Post(mailbox)
            running = [actor.run.remote(fn, Rank(rank, world_size, meeting, post)) for rank, actor in enumerate(actors)]
            pending = list(running)
            while pending:
                done, pending = ray.wait(pending, num_returns=1, timeout=POLL_SECONDS)
                for event in ray.get(mailbox.drain.remote()):
                    emit(event)
                for reference in done:
                    _raise_failure(reference, pending)
            return _get(running[0])
        finally:
            for actor in [*actors, mailbox]:
                ray.kill(actor)

    def close(self) -> None:
        """Dismiss the workers."""
        while self._actors:
            ray.kill(self._actors.pop())


def _actor(kind: type, resources: Resources) -> ActorHandle[Any]:
    options = {"num_cpus": resources.threads, "num_gpus": resources.gpus, "max_restarts": 0, "max_task_retries": 0}
    actor: ActorHandle[Any] = ray.remote(kind).options(**options).remote(resources.threads)
    return actor


def _send(
    flying: dict[Any, tuple[int, ActorHandle[Any]]],
    actor: ActorHandle[Any],
    fn: Callable[[Any], Any],
    tasks: Sequence[Any],
    waiting: list[int],
) -> None:
    if waiting:
        index = waiting.pop()
        flying[actor.run.remote(fn, tasks[index])] = (index, actor)


def _get(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        # The user's errors are ours to show, without Ray's remote traceback around them.
        raise error.cause from None


def _raise_failure(reference: Any, pending: list[Any]) -> None:
    """Raise what a rank raised; a death anywhere counts more than its echo in a surviving rank."""
    try:
        _get(reference)
    except _SYSTEM_FAILURES:
        raise
    except RuntimeError:
        settled, _ = ray.wait(pending, num_returns=len(pending), timeout=SETTLE_SECONDS) if pending else ([], [])
        for other in settled:
            try:
                _get(other)
            except _SYSTEM_FAILURES:
                raise
            except Exception:  # noqa: BLE001, S112 - the first rank's own error is raised below
                continue
        raise


def _await_first(actors: list[ActorHandle[Any]], resources: Resources) -> None:
    if actors and not ray.wait([actor.ready.remote() for actor in actors], timeout=START_SECONDS)[0]:
        raise _no_room(resources, 1)


def _await_all(actors: list[ActorHandle[Any]], resources: Resources) -> None:
    ready = [actor.ready.remote() for actor in actors]
    if len(ray.wait(ready, num_returns=len(ready), timeout=START_SECONDS)[0]) < len(ready):
        raise _no_room(resources, len(actors))


def _no_room(resources: Resources, wanted: int) -> BusyError:
    total = ray.cluster_resources()
    return BusyError(
        f"Ray started fewer than {wanted} workers of {resources.threads} CPUs and {resources.gpus:g} GPUs within "
        f"{START_SECONDS:.0f} s; the cluster has {total.get('CPU', 0):g} CPUs and {total.get('GPU', 0):g} GPUs",
        "lower compute.threads, compute.rank_threads, compute.ranks or compute.gpus, or resume when it is free",
    )


def _first_line(error: BaseException) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:200]
