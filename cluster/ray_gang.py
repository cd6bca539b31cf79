"""A gang on Ray: all ranks or none, watched by their heartbeat, started again from their own checkpoint."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster import interruption
from cluster.failures import Backoff, first_line
from cluster.pool import Phase, Rank, Resources
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
    let_finish,
    require_node,
    rest,
    started,
    wait_for,
)
from cluster.watch import BEAT_SECONDS, Beat, Lost, Pace, Watch
from schemas.errors import KilobasisError, StageFailedError
from schemas.events import CheckpointCommitted, Event, Note, WorkerLost

# Failures in a row, without a new checkpoint in between, after which a gang is given up.
FAILURES = 5
# Once one rank has failed the others fail too; so long to see which of them knows the reason.
SETTLE_SECONDS = 5.0
# For a rank's last events to arrive, before it returns.
FLUSH_SECONDS = 10.0
MAIL_SECONDS = 4.0


class _RankLostError(Exception):
    """A rank is dead, silent, hanging, or has raised; the gang has to be started again."""

    def __init__(self, who: str, reason: str) -> None:
        super().__init__(who, reason)
        self.who, self.reason = who, reason


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

    def read(self) -> tuple[list[Event], list[Beat]]:
        """What has come since. A slow answer is waited for again at the next call, so that nothing is lost."""
        self._asked = self._asked or self.mailbox.drain.remote()
        if not ray.wait([self._asked], timeout=MAIL_SECONDS)[0]:
            return [], []
        asked, self._asked = self._asked, None
        answer = fetch(asked)
        if isinstance(answer, Returned):
            mail: tuple[list[Event], list[Beat]] = answer.value
            return mail
        raise _RankLostError("the mailbox", first_line(answer.error))


class _Post:
    """A rank's end of the mailbox, with a thread of its own that beats whatever the rank does."""

    def __init__(self, rank: int, mailbox: ActorHandle[Any]) -> None:
        self._rank, self._mailbox = rank, mailbox
        self._at: tuple[int, Phase] = (0, "starting")
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, name="heartbeat", daemon=True)

    def emit(self, event: Event) -> None:
        self._mailbox.push.remote(event)

    def at(self, step: int, phase: Phase) -> None:
        self._at = (step, phase)

    def _beat(self) -> Any:
        step, phase = self._at
        return self._mailbox.beat.remote(Beat(self._rank, step, phase, time.monotonic()))

    def _keep_beating(self) -> None:
        self._beat()
        while not self._over.wait(BEAT_SECONDS):
            self._beat()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        # Whatever was sent before has arrived when this has.
        ray.wait([self._beat()], timeout=FLUSH_SECONDS)


def _run_rank(fn: Callable[[Rank], Any], rank: int, world_size: int, meeting: str, mailbox: ActorHandle[Any]) -> Any:
    """In a worker: one rank, from its first beat to its last."""
    with _Post(rank, mailbox) as post:
        return fn(Rank(rank, world_size, meeting, post.emit, post.at))


def run(
    fn: Callable[[Rank], Any], world_size: int, resources: Resources, emit: Callable[[Event], None], stage: str
) -> Any:
    """See `cluster.pool.Pool.gang`."""
    backoff, pace = Backoff(), Pace()
    lost = barren = 0
    committed = False

    def heard(event: Event) -> None:
        nonlocal committed
        committed = committed or isinstance(event, CheckpointCommitted)
        emit(event)

    while True:
        try:
            return _Gang(world_size, resources, heard, stage, pace).run(fn)
        except _RankLostError as error:
            lost += 1
            barren = 1 if committed else barren + 1
            if committed:
                backoff.reset()
            committed = False
            emit(WorkerLost(stage, error.reason, lost, error.who))
            require_node()
            if barren >= FAILURES:
                raise StageFailedError(
                    f"{stage}: the gang of {world_size} failed {barren} times in a row without a new checkpoint, "
                    f"the last time because of {error.who}: {error.reason}",
                    "the run's events tell of each time; remove the cause, then resume from the last checkpoint",
                ) from error
            rest(backoff.wait())


class _Gang:
    """One life of a gang: from hiring its workers to the end of the last one."""

    def __init__(
        self, world_size: int, resources: Resources, emit: Callable[[Event], None], stage: str, pace: Pace
    ) -> None:
        self._size, self._resources, self._emit, self._stage, self._pace = world_size, resources, emit, stage, pace
        self._places: dict[int, Place] = {}
        self._inbox = _Inbox()
        self._actors: list[ActorHandle[Any]] = []

    def run(self, fn: Callable[[Rank], Any]) -> Any:
        """Run it.

        Returns:
            What rank 0 returned.

        Raises:
            _RankLostError: it has to be started again. All of it is dead.
            KilobasisError: a rank raised it, or the ranks did not start in time.
        """
        try:
            self._actors = [hire(self._resources) for _ in range(self._size)]
            self._gather()
            return self._watch(fn, self._meet())
        except _RankLostError:
            raise
        except BaseException:
            let_finish(self._actors)
            raise
        finally:
            dismiss([*self._actors, self._inbox.mailbox], list(self._places.values()))

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
                    raise _RankLostError(f"rank {rank}", f"died while it started: {place.reason}")
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
        raise _RankLostError("rank 0", f"did not say where to meet: {first_line(answer.error)}")

    def _watch(self, fn: Callable[[Rank], Any], meeting: str) -> Any:
        watch = Watch(self._size, self._pace, time.monotonic())
        running = {
            actor.run.remote(_run_rank, fn, rank, self._size, meeting, self._inbox.mailbox): rank
            for rank, actor in enumerate(self._actors)
        }
        result = None
        while running:
            interruption.check()
            done, _ = ray.wait(list(running), num_returns=1, timeout=POLL_SECONDS)
            lost = self._look(watch)
            for reference in done:
                rank, outcome = running.pop(reference), fetch(reference)
                if not isinstance(outcome, Returned):
                    raise self._failed(rank, outcome, running, watch)
                watch.left(rank)
                if rank == 0:
                    result = outcome.value
            if lost is not None and lost.rank in running.values():
                raise _RankLostError(f"rank {lost.rank}", f"{self._place(lost.rank)}{lost.reason}")
        return result

    def _look(self, watch: Watch) -> Lost | None:
        mail, beats = self._inbox.read()
        for event in mail:
            self._emit(event)
        lost = watch.look(beats, time.monotonic())
        for text in watch.slow():
            self._emit(Note(self._stage, text))
        return lost

    def _failed(self, rank: int, outcome: Raised | Gone, others: dict[Any, int], watch: Watch) -> Exception:
        """What to raise for a rank that failed: the others' failures are often only its echo, or it is theirs."""
        failed = {rank: outcome}
        if isinstance(outcome, Raised) and not isinstance(outcome.error, KilobasisError) and others:
            settled, _ = wait_for(list(others), SETTLE_SECONDS)
            for reference in settled:
                other = fetch(reference)
                if not isinstance(other, Returned):
                    failed[others[reference]] = other
            # What they had to say in the end.
            self._look(watch)
        for each in failed.values():
            if isinstance(each, Raised) and isinstance(each.error, KilobasisError):
                return each.error
        for number, each in failed.items():
            if isinstance(each, Gone):
                return _RankLostError(
                    f"rank {number}", f"{self._place(number)}died {watch.where(number)}: {each.reason}"
                )
        assert isinstance(outcome, Raised)
        reason = f"{self._place(rank)}raised {watch.where(rank)}: {first_line(outcome.error)}"
        return _RankLostError(f"rank {rank}", reason)

    def _place(self, rank: int) -> str:
        return f"{self._places[rank]} " if rank in self._places else ""
