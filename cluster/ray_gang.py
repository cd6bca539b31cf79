"""A gang on Ray: all ranks or none, watched by their heartbeat, started again from their own checkpoint."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster import interruption
from cluster.failures import Backoff, first_line
from cluster.pool import Phase, Rank, Resources
from cluster.ray_notices import Notices
from cluster.ray_room import Room
from cluster.ray_worker import (
    FETCH_SECONDS,
    POLL_SECONDS,
    START_SECONDS,
    Gone,
    Lobby,
    Place,
    Raised,
    Returned,
    dismiss,
    fetch,
    hire,
    leaving,
    let_finish,
    require_node,
    rest,
    started,
    wait_for,
)
from cluster.storage import traffic
from cluster.storage.traffic import Traffic
from cluster.watch import BEAT_SECONDS, STORE_SECONDS, Beat, Lost, Pace, Watch, doing
from schemas.errors import KilobasisError, LeftError, OutrunError, StageFailedError
from schemas.events import CheckpointCommitted, Event, Note, StoreUsed, WorkerLost

# Failures in a row that may be the gang's own, without a new checkpoint in between, after which it is given up.
FAILURES = 5
# A machine that is cut off counts as dead so late. Until then its ranks' failures look like the gang's own.
NODE_SECONDS = 75.0
# Once one rank has failed the others fail too; so long to see which of them knows the reason.
SETTLE_SECONDS = 5.0
# For a rank's last events to arrive, before it returns.
FLUSH_SECONDS = 10.0
MAIL_SECONDS = 4.0


class _RankLostError(Exception):
    """A rank is dead, silent, hanging, or has raised; the gang has to be started again.

    `own` says that the gang itself may be the cause, for all that is known by then.
    """

    def __init__(self, who: str, reason: str, own: bool = True) -> None:
        super().__init__(who, reason)
        self.who, self.reason, self.own = who, reason, own


class _Mailbox:
    """Carries events and beats of a gang to the driver. Of beats only the last one of each rank counts."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._beats: dict[int, Beat] = {}

    def push(self, event: Event) -> None:
        self._events.append(event)

    def beat(self, beat: Beat) -> None:
        self._beats[beat.rank] = beat

    def drain(self) -> tuple[list[Event], list[Beat]]:
        drained, self._events, self._beats = (self._events, list(self._beats.values())), [], {}
        return drained


class _Inbox:
    """The driver's end of the mailbox, which is on the driver's node: it goes down with the driver only."""

    def __init__(self) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.mailbox: ActorHandle[Any] = ray.remote(_Mailbox).options(num_cpus=0, scheduling_strategy=here).remote()
        self._asked: Any = None

    def last(self) -> tuple[list[Event], list[Beat]]:
        """What has come up to now, from ranks that have ended."""
        # A question that is still open may have been put before they had said their last.
        mail, beats = self.read(FLUSH_SECONDS) if self._asked else ([], [])
        rest, later = self.read(FLUSH_SECONDS)
        return [*mail, *rest], [*beats, *later]

    def read(self, patience: float = MAIL_SECONDS) -> tuple[list[Event], list[Beat]]:
        """What has come since. A slow answer is waited for again at the next call, so that nothing is lost."""
        self._asked = self._asked or self.mailbox.drain.remote()
        if not ray.wait([self._asked], timeout=patience)[0]:
            return [], []
        asked, self._asked = self._asked, None
        answer = fetch(asked)
        if isinstance(answer, Returned):
            mail: tuple[list[Event], list[Beat]] = answer.value
            return mail
        raise _RankLostError("the mailbox", first_line(answer.error), own=False)


class _Post:
    """A rank's end of the mailbox, with a thread of its own that beats whatever the rank does."""

    def __init__(self, rank: int, mailbox: ActorHandle[Any]) -> None:
        self._rank, self._mailbox = rank, mailbox
        self._at: tuple[int, Phase] = (0, "starting")
        self._over, self._works = threading.Event(), 0
        self._thread = threading.Thread(target=self._keep_beating, name="heartbeat", daemon=True)

    def emit(self, event: Event) -> None:
        self._mailbox.push.remote(event)

    def at(self, step: int, phase: Phase) -> None:
        self._at = (step, phase)

    def _beat(self) -> Any:
        step, phase = self._at
        line, waits = doing(self._works)
        return self._mailbox.beat.remote(Beat(self._rank, step, phase, time.monotonic(), line, waits, traffic.total()))

    def _keep_beating(self) -> None:
        self._beat()
        while not self._over.wait(BEAT_SECONDS):
            self._beat()

    def __enter__(self) -> Self:
        self._works = threading.get_ident()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        # A beat that was begun before must not come behind the last one, and tell of less.
        self._thread.join(FLUSH_SECONDS)
        # Whatever was sent before has arrived when this has.
        ray.wait([self._beat()], timeout=FLUSH_SECONDS)


def _run_rank(fn: Callable[[Rank], Any], rank: int, world_size: int, meeting: str, mailbox: ActorHandle[Any]) -> Any:
    """In a worker: one rank, from its first beat to its last."""
    with _Post(rank, mailbox) as post:
        return fn(Rank(rank, world_size, meeting, post.emit, post.at, leaving.is_set))


def run(
    fn: Callable[[Rank], Any],
    world_size: int,
    resources: Resources,
    emit: Callable[[Event], None],
    stage: str,
    store_seconds: float = STORE_SECONDS,
) -> Any:
    """See `cluster.pool.Pool.gang`. `store_seconds` is the deadline of a rank that reads or saves."""
    with Notices() as notices:
        return _run(fn, world_size, resources, emit, stage, store_seconds, notices)


def _run(
    fn: Callable[[Rank], Any],
    world_size: int,
    resources: Resources,
    emit: Callable[[Event], None],
    stage: str,
    store_seconds: float,
    notices: Notices,
) -> Any:
    """One life of the gang after another."""
    backoff, pace = Backoff(), Pace()
    lost, committed = 0, False
    barren: list[frozenset[str]] = []

    def heard(event: Event) -> None:
        nonlocal committed
        committed = committed or isinstance(event, CheckpointCommitted)
        emit(event)

    while True:
        notices.require_here()
        gang = _Gang(world_size, resources, heard, stage, pace, store_seconds, notices)
        try:
            return gang.run(fn)
        except LeftError as error:
            # Nobody failed. The next life has the checkpoint that this one left.
            emit(Note(stage, f"{error.what}; its gang starts again on other machines"))
        except _RankLostError as error:
            lost += 1
            if committed:
                backoff.reset()
                barren.clear()
            committed = False
            emit(WorkerLost(stage, error.reason, lost, error.who))
            require_node()
            if error.own:
                barren.append(gang.nodes)
            if _own(barren, emit, stage) >= FAILURES:
                raise StageFailedError(
                    f"{stage}: the gang of {world_size} failed {len(barren)} times in a row without a new checkpoint, "
                    f"the last time because of {error.who}: {error.reason}",
                    "the run's events tell of each time; remove the cause, then resume from the last checkpoint",
                ) from error
            rest(backoff.wait())


def _own(barren: list[frozenset[str]], emit: Callable[[Event], None], stage: str) -> int:
    """How many failures are still the gang's own; those of a gang that had lost a node are forgotten.

    The others are heard first when a node goes down: they raise that a connection was closed. Of the node itself
    one hears later, so before a gang is given up there is a wait for that, unless it was on this machine alone.
    """
    here, began = ray.get_runtime_context().get_node_id(), time.monotonic()
    while True:
        dead = {node["NodeID"] for node in ray.nodes() if not node["Alive"]}
        barren[:] = [nodes for nodes in barren if not nodes & dead]
        elsewhere = any(nodes - {here} for nodes in barren)
        waited = time.monotonic() - began
        if len(barren) < FAILURES or not elsewhere or waited > NODE_SECONDS:
            return len(barren)
        if not waited >= POLL_SECONDS:
            text = f"{FAILURES} failures without a new checkpoint; looking for {NODE_SECONDS:.0f} s whether a node died"
            emit(Note(stage, text))
        rest(POLL_SECONDS)


class _Gang:
    """One life of a gang: from hiring its workers to the end of the last one."""

    def __init__(
        self,
        world_size: int,
        resources: Resources,
        emit: Callable[[Event], None],
        stage: str,
        pace: Pace,
        store_seconds: float,
        notices: Notices,
    ) -> None:
        self._size, self._resources, self._emit, self._stage, self._pace = world_size, resources, emit, stage, pace
        self._store_seconds, self._notices, self._leaves = store_seconds, notices, False
        self._room = Room(world_size, resources, emit, stage, notices)
        self._places: dict[int, Place] = {}
        self._inbox = _Inbox()
        self._actors: list[ActorHandle[Any]] = []
        self._traffic: dict[int, Traffic] = {}
        self._told = Traffic()

    @property
    def nodes(self) -> frozenset[str]:
        """Where its ranks are, as far as they have started."""
        return frozenset(place.node for place in self._places.values())

    def run(self, fn: Callable[[Rank], Any]) -> Any:
        """Run it.

        Returns:
            What rank 0 returned.

        Raises:
            _RankLostError: it has to be started again. All of it is dead.
            LeftError: the same, because a machine of it is being taken away.
            KilobasisError: a rank raised it, or there was no room for the ranks in time.
        """
        try:
            self._actors = [hire(self._resources, seat) for seat in self._room.take()]
            self._gather()
            return self._watch(fn, self._meet())
        except (_RankLostError, LeftError):
            raise
        except BaseException:
            let_finish(self._actors)
            raise
        finally:
            dismiss([*self._actors, self._inbox.mailbox], list(self._places.values()))
            self._room.leave()

    def _gather(self) -> None:
        """Wait until all workers are there."""
        lobby, since = Lobby(self._resources, self._emit, self._stage), time.monotonic()
        starting = {actor.place.remote(): rank for rank, actor in enumerate(self._actors)}
        while starting:
            interruption.check()
            done, _ = ray.wait(list(starting), num_returns=1, timeout=POLL_SECONDS)
            for reference in done:
                rank = starting.pop(reference)
                place = started(reference)
                if isinstance(place, Gone):
                    raise _RankLostError(f"rank {rank}", f"died while it started: {place.reason}", place.crashed)
                self._places[rank] = place
            if starting:
                waited = time.monotonic() - since
                lobby.wait(len(starting), waited, START_SECONDS - waited)

    def _meet(self) -> str:
        """Ask rank 0 where."""
        asked = self._actors[0].meeting_point.remote()
        wait_for([asked], FETCH_SECONDS)
        answer = fetch(asked)
        if isinstance(answer, Returned):
            return str(answer.value)
        own = not isinstance(answer, Gone) or answer.crashed
        raise _RankLostError("rank 0", f"did not say where to meet: {first_line(answer.error)}", own)

    def _watch(self, fn: Callable[[Rank], Any], meeting: str) -> Any:
        watch = Watch(self._size, self._pace, time.monotonic(), self._store_seconds)
        running = {
            actor.run.remote(_run_rank, fn, rank, self._size, meeting, self._inbox.mailbox): rank
            for rank, actor in enumerate(self._actors)
        }
        result = None
        while running:
            interruption.check()
            done, _ = ray.wait(list(running), num_returns=1, timeout=POLL_SECONDS)
            lost = self._look(watch)
            self._heed()
            for reference in done:
                rank, outcome = running.pop(reference), fetch(reference)
                if not isinstance(outcome, Returned):
                    raise self._failed(rank, outcome, running, watch)
                watch.left(rank)
                if rank == 0:
                    result = outcome.value
            if lost is not None and lost.rank in running.values():
                raise _RankLostError(f"rank {lost.rank}", f"{self._place(lost.rank)}{lost.reason}")
        self._hear(*self._inbox.last())
        return result

    def _heed(self) -> None:
        """Ask all ranks to save and to leave, once, when a machine of one of them is being taken away."""
        gone = [rank for rank, place in sorted(self._places.items()) if place.node in self._notices.leaving]
        if not gone or self._leaves:
            return
        self._leaves = True
        for actor in self._actors:
            actor.leave.remote()
        place = self._places[gone[0]]
        named = f"rank{'s' * (len(gone) > 1)} {', '.join(map(str, gone))}"
        text = f"{self._notices.told(place.node, place.host)}, with {named} on it: the gang saves, and moves"
        self._emit(Note(self._stage, text))

    def _look(self, watch: Watch) -> Lost | None:
        mail, beats = self._inbox.read()
        self._hear(mail, beats)
        lost = watch.look(beats, time.monotonic())
        for text in watch.slow():
            self._emit(Note(self._stage, text))
        return lost

    def _hear(self, mail: Sequence[Event], beats: Sequence[Beat]) -> None:
        """Pass events on, and tell what ranks have moved, as their beats say it."""
        for event in mail:
            self._emit(event)
        self._traffic |= {beat.rank: beat.traffic for beat in beats}
        moved = sum(self._traffic.values(), Traffic())
        if moved != self._told:
            self._emit(StoreUsed(self._stage, *dataclasses.astuple(moved - self._told)))
            self._told = moved

    def _failed(self, rank: int, outcome: Raised | Gone, others: dict[Any, int], watch: Watch) -> Exception:
        """What to raise for a rank that failed: the others' failures are often only its echo, or it is theirs."""
        failed = {rank: outcome}
        if isinstance(outcome, Raised) and _verdict([outcome]) is None and others:
            settled, _ = wait_for(list(others), SETTLE_SECONDS)
            for reference in settled:
                other = fetch(reference)
                if not isinstance(other, Returned):
                    failed[others[reference]] = other
        # What they had to say in the end.
        self._hear(*self._inbox.last())
        if verdict := _verdict(list(failed.values())):
            return verdict
        for each in failed.values():
            if isinstance(each, Raised) and isinstance(each.error, LeftError):
                return each.error
        for number, each in failed.items():
            if isinstance(each, Gone):
                reason = f"{self._place(number)}died {watch.where(number)}: {each.reason}"
                return _RankLostError(f"rank {number}", reason, each.crashed)
        assert isinstance(outcome, Raised)
        reason = f"{self._place(rank)}raised {watch.where(rank)}: {first_line(outcome.error)}"
        return _RankLostError(f"rank {rank}", reason)

    def _place(self, rank: int) -> str:
        return f"{self._places[rank]} " if rank in self._places else ""


def _verdict(outcomes: Sequence[Raised | Gone]) -> KilobasisError | None:
    """What some rank knows for certain, and another life would find again.

    That somebody else trains is no such thing: the newest checkpoint is his. Nor is that a gang was asked to leave.
    """
    for each in outcomes:
        error = each.error if isinstance(each, Raised) else None
        if isinstance(error, KilobasisError) and not isinstance(error, (OutrunError, LeftError)):
            return error
    return None
