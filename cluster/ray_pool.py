"""A pool on Ray: long-lived worker actors, one task in flight each, nothing bulky in the object store.

A worker that is lost is replaced here, and its task given to another one; that is safe because a task
commits its unit itself, outside Ray, and a committed unit is not run again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle

from cluster import interruption, ray_gang
from cluster.backlog import Backlog
from cluster.failures import ATTEMPTS, UNIT_SECONDS, Backoff, Reminder, Tries
from cluster.pool import Rank, Resources
from cluster.ray_worker import (
    POLL_SECONDS,
    START_SECONDS,
    TELL_SECONDS,
    Gone,
    Lobby,
    Place,
    Raised,
    Returned,
    dismiss,
    fetch,
    hire,
    let_finish,
    require_node,
    rest,
    started,
    wait_for,
)
from cluster.watch import SILENT_SECONDS, STORE_SECONDS
from schemas.events import Event, Note, WorkerLost

# So long a unit may take before its worker is asked whether it is still there, and so often.
ASK_SECONDS = 60.0
_NAMED_AT_MOST = 16


@dataclass(frozen=True, slots=True)
class _Hand:
    """A worker that has started."""

    actor: ActorHandle[Any]
    place: Place


@dataclass(slots=True)
class _Flight:
    """A task that a worker has."""

    index: int
    unit: str
    hand: _Hand
    since: float
    asked: float


class RayPool:
    """See `cluster.pool.Pool`. Needs an open `ray_session`.

    Args:
        workers: Workers of `map`.
        attempts: How often a unit that raises is tried.
        unit_seconds: Seconds that a unit may take.
        rank_seconds: Seconds that a gang may wait for a rank which reads or saves.
    """

    def __init__(
        self,
        workers: int,
        attempts: int = ATTEMPTS,
        unit_seconds: float = UNIT_SECONDS,
        rank_seconds: float = STORE_SECONDS,
    ) -> None:
        self._workers, self._attempts = workers, attempts
        self._unit_seconds, self._rank_seconds = unit_seconds, rank_seconds
        self._crew: _Crew | None = None

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
        tries = Tries(stage, len(tasks), self._attempts, emit)
        waiting, backlog = deque(range(len(tasks))), Backlog(stage, emit)
        try:
            crew = self._staff(stage, resources, emit)
            while waiting or crew.flying:
                crew.hire(min(self._workers, len(waiting) + len(crew.flying)))
                while waiting and crew.idle:
                    index = waiting.popleft()
                    crew.send(fn, tasks[index], index, name(tasks[index]))
                backlog.at(len(waiting), len(crew.flying))
                for flight, outcome in crew.land():
                    if isinstance(outcome, Returned):
                        tries.done()
                        yield flight.index, outcome.value
                    elif _again(tries, flight.unit, outcome):
                        waiting.append(flight.index)
            backlog.at(0, 0)
            tries.settle()
        except BaseException:
            self.close()
            raise

    def _staff(self, stage: str, resources: Resources, emit: Callable[[Event], None]) -> _Crew:
        """Workers for a stage. Those of an earlier call in the same stage have loaded what they need, and stay."""
        if self._crew is None or not self._crew.serves(stage, resources):
            self.close()
            self._crew = _Crew(stage, resources, emit, self._unit_seconds)
        self._crew.begin(emit)
        return self._crew

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
        return ray_gang.run(fn, world_size, resources, emit, stage, self._rank_seconds)

    def close(self) -> None:
        """Dismiss the workers. One that is in the middle of a unit may finish the object that it is writing."""
        if self._crew is not None:
            crew, self._crew = self._crew, None
            crew.dismiss()


def _again(tries: Tries, unit: str, outcome: Raised | Gone) -> bool:
    """Whether to run a unit again. One that lost its node or its connection is not to blame."""
    if isinstance(outcome, Raised):
        return tries.raised(unit, outcome.error, outcome.traceback)
    return not outcome.crashed or tries.crashed(unit, outcome.reason, outcome.error)


class _Crew:
    """The workers of one stage: those that start, those that wait for work and those that have some."""

    def __init__(self, stage: str, resources: Resources, emit: Callable[[Event], None], unit_seconds: float) -> None:
        self._stage, self._resources, self._emit, self._unit_seconds = stage, resources, emit, unit_seconds
        self.idle: list[_Hand] = []
        self.flying: dict[Any, _Flight] = {}
        self._starting: dict[Any, ActorHandle[Any]] = {}
        self._lobby = Lobby(resources, emit, stage)
        self._backoff, self._not_before = Backoff(), 0.0
        self._lost, self._reason = 0, ""
        self.begin(emit)

    def serves(self, stage: str, resources: Resources) -> bool:
        """Whether these are the workers for this."""
        return (self._stage, self._resources) == (stage, resources)

    def begin(self, emit: Callable[[Event], None]) -> None:
        """A call of `map` begins; what it waits for counts from now."""
        self._emit = emit
        self._short_since = self._alone_since = self._progress = time.monotonic()
        self._reminder = Reminder(TELL_SECONDS, TELL_SECONDS)

    def hire(self, wanted: int) -> None:
        """Ask for workers that are missing, though not right after one was lost.

        Raises:
            BusyError: nobody has started for too long.
        """
        now = time.monotonic()
        working = len(self.idle) + len(self.flying)
        missing = wanted - working
        while now >= self._not_before and missing > len(self._starting):
            actor = hire(self._resources)
            self._starting[actor.place.remote()] = actor
        if working:
            self._alone_since = now
        if missing <= 0:
            self._short_since = now
        else:
            left = None if working else START_SECONDS - (now - self._alone_since)
            self._lobby.wait(missing, now - self._short_since, left, self._reason)

    def send(self, fn: Callable[[Any], Any], task: Any, index: int, unit: str) -> None:
        """Give a task to a worker that waits for one."""
        hand, now = self.idle.pop(), time.monotonic()
        self.flying[hand.actor.run.remote(fn, task)] = _Flight(index, unit, hand, now, now)

    def land(self) -> list[tuple[_Flight, Returned | Raised | Gone]]:
        """Wait a moment for something to happen; what came of tasks that have ended since."""
        interruption.check()
        awaited = [*self._starting, *self.flying]
        if not awaited:
            rest(min(POLL_SECONDS, self._not_before - time.monotonic()))
            return []
        done, _ = ray.wait(awaited, num_returns=1, timeout=POLL_SECONDS)
        landed = []
        for reference in done:
            if reference in self._starting:
                self._welcome(reference)
            else:
                landed.append(self._settle(reference, fetch(reference)))
        now = time.monotonic()
        if landed:
            self._progress = now
        return [*landed, *self._overdue(now), *self._silent(now)]

    def _welcome(self, reference: Any) -> None:
        actor = self._starting.pop(reference)
        place = started(reference)
        if isinstance(place, Place):
            self.idle.append(_Hand(actor, place))
        else:
            self._lose(place, "")

    def _settle(self, reference: Any, outcome: Returned | Raised | Gone) -> tuple[_Flight, Returned | Raised | Gone]:
        flight = self.flying.pop(reference)
        if isinstance(outcome, Gone):
            outcome = Gone(outcome.error, f"{flight.hand.place}: {outcome.reason}", outcome.crashed)
            dismiss([flight.hand.actor], [flight.hand.place])
            self._lose(outcome, f"unit {flight.unit}")
        else:
            self.idle.append(flight.hand)
        if isinstance(outcome, Returned):
            self._backoff.reset()
        return flight, outcome

    def _lose(self, outcome: Gone, doing: str) -> None:
        self._lost += 1
        self._reason = outcome.reason
        now = time.monotonic()
        # Workers that are lost together count as one loss: their node took them along.
        if now >= self._not_before:
            self._not_before = now + self._backoff.wait()
        self._emit(WorkerLost(self._stage, outcome.reason, self._lost, doing))
        require_node()

    def _silent(self, now: float) -> list[tuple[_Flight, Returned | Raised | Gone]]:
        """Tell what is in flight when nothing lands; ask those that take long whether they are there.

        A stopped process keeps its connections, so nobody else would ever notice. It counts as crashed: were it
        the unit that holds it up, that would happen again and again.
        """
        if self._reminder.due(now - self._progress):
            named = [
                f"{flight.unit} for {now - flight.since:.0f} s ({flight.hand.place})"
                for flight in list(self.flying.values())[:_NAMED_AT_MOST]
            ]
            more = f" and {len(self.flying) - len(named)} more" if len(self.flying) > len(named) else ""
            text = f"no unit ended for {now - self._progress:.0f} s; in flight: {', '.join(named) or 'none'}{more}"
            limit = f"; each has {self._unit_seconds:.0f} s (compute.unit_seconds)" if self.flying else ""
            self._emit(Note(self._stage, f"{text}{limit}"))
        due = {reference: flight for reference, flight in self.flying.items() if now - flight.asked >= ASK_SECONDS}
        if not due:
            return []
        asked = {flight.hand.actor.alive.remote(): reference for reference, flight in due.items()}
        for flight in due.values():
            flight.asked = now
        _, mute = wait_for(list(asked), SILENT_SECONDS)
        error = TimeoutError(f"did not answer for {SILENT_SECONDS:.0f} s")
        return [self._settle(asked[question], Gone(error, str(error), crashed=True)) for question in mute]

    def _overdue(self, now: float) -> list[tuple[_Flight, Returned | Raised | Gone]]:
        """Kill the workers of units that take too long, whatever they answer. It counts as if the unit had raised."""
        landed: list[tuple[_Flight, Returned | Raised | Gone]] = []
        late = [reference for reference, flight in self.flying.items() if now - flight.since > self._unit_seconds]
        for reference in late:
            flight = self.flying.pop(reference)
            dismiss([flight.hand.actor], [flight.hand.place])
            limit = f"{self._unit_seconds:.0f} s (compute.unit_seconds)"
            error = TimeoutError(f"did not end within {limit}; its worker, {flight.hand.place}, was killed")
            landed.append((flight, Raised(error, "")))
        return landed

    def dismiss(self) -> None:
        """Kill them all."""
        if self.flying:
            let_finish([flight.hand.actor for flight in self.flying.values()])
        hands = [*self.idle, *(flight.hand for flight in self.flying.values())]
        dismiss([*self._starting.values(), *(hand.actor for hand in hands)], [hand.place for hand in hands])
        self.idle, self.flying, self._starting = [], {}, {}
