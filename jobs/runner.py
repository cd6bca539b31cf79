"""Runs a plan: stage after stage, each committed before the next begins."""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, NamedTuple, Self

from cluster import interruption
from cluster.pool import InlinePool, Pool
from cluster.storage import traffic
from cluster.storage.attempts import shortage
from cluster.storage.create import create
from jobs import lease as leases
from jobs import plan as planning
from jobs import preflight
from jobs.fingerprint import fingerprint, spec
from jobs.mesh import resolved
from jobs.out import StageOut
from jobs.passes import companions
from jobs.progress import Watchers
from jobs.sources import survey
from jobs.state import StageFolder
from jobs.workspace import PROCESS, Workspace, label
from pipeline.stage import Committed, Job, Out, Params, Sources, Stage
from schemas.compute import Compute
from schemas.errors import BusyError, FencedError, InterruptedRunError, KilobasisError
from schemas.events import Event, Note, StageCommitted, StageStarted
from schemas.manifest import Dictionary, Manifest
from schemas.records import Outputs, canonical_json


def run(manifest: Manifest, resume: bool = False, wait: bool = False) -> dict[str, Committed]:
    """Run everything that is not committed.

    Args:
        manifest: What to run.
        resume: Refuse to start anything new.
        wait: Wait where another run leads a stage, instead of refusing.

    Returns:
        Every stage, by label.

    Raises:
        KilobasisError: see `schemas.errors` for each kind and its exit code.
    """
    # First of all: a look at a large model or corpus may take as long as a stage.
    with _interruptible() as stop:
        # What this process has moved until now is no part of the run.
        traffic.fresh()
        workspace = Workspace.of(manifest)
        if resume:
            workspace.require_unchanged()
        sources = survey(manifest)
        interruption.check()
        manifest = resolved(manifest, sources)
        planned = planning.make(manifest, workspace, sources)
        planning.refuse(planned, manifest, workspace)
        interruption.check()
        workspace.claim(manifest.compute.single_writer)
        interruption.check()
        folder = workspace.new_run()
        create(folder / PROCESS, canonical_json(leases.this_process().model_dump()) + b"\n")
        # The run's last word is written before Ray is left, which takes seconds.
        with ExitStack() as stack, Watchers(folder) as emit, shortage("stopped"):
            joined = functools.partial(preflight.require, planned, manifest, workspace.root, emit)
            pool = _LazyPool(manifest.compute, stack, joined)
            if manifest.compute.address is not None and planned.open:
                # Before any stage begins: what the machines say may refuse the run.
                pool.open()
            return _run_stages(manifest, workspace, planned.sources, emit, pool, wait, stop)


def _run_stages(
    manifest: Manifest,
    workspace: Workspace,
    sources: Sources,
    emit: Callable[[Event], None],
    pool: _LazyPool,
    wait: bool,
    stop: Callable[[str, str], None],
) -> dict[str, Committed]:
    done: dict[str, Committed] = {}
    for stage, dictionary in planning.instances(manifest):
        if label(stage, dictionary) in done:
            # Another dictionary's stage took it along.
            continue
        with _StageRun(stage, manifest, workspace, sources, done, emit, pool, stop) as run:
            run.add(dictionary, wait)
            if run.leads:
                for other in companions(stage, dictionary, manifest, sources, run.is_open):
                    run.add(other, wait=None)
            done |= run.finish()
        if stage.name == "tokenize":
            # Only now the number of rows is known, so what was planned from an estimate is checked again.
            sources = planning.refine(sources, done[stage.name])
            planning.refuse(planning.make(manifest, workspace, sources), manifest, workspace, started=True)
    return done


class _Place(NamedTuple):
    """One dictionary's stage: its folder, and what it runs on."""

    folder: StageFolder
    params: Params
    inputs: Mapping[str, Committed]

    @property
    def digests(self) -> dict[str, str]:
        return {need: committed.record.digest for need, committed in self.inputs.items()}


class _StageRun:
    """Brings a stage of one dictionary, or of several at once, from wherever it is to its commit. A context manager.

    Leases that were taken are kept alive until it ends.
    """

    def __init__(
        self,
        stage: Stage,
        manifest: Manifest,
        workspace: Workspace,
        sources: Sources,
        done: Mapping[str, Committed],
        emit: Callable[[Event], None],
        pool: _LazyPool,
        stop: Callable[[str, str], None],
    ) -> None:
        self._stage, self._manifest, self._workspace, self._sources = stage, manifest, workspace, sources
        self._done, self._emit, self._pool, self._stop = done, emit, pool, stop
        self._committed: dict[str, Committed] = {}
        self._led: list[tuple[_Place, leases.Lease]] = []
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    @property
    def leads(self) -> bool:
        """Whether there is anything to be done, and we are the ones to do it."""
        return bool(self._led)

    def is_open(self, dictionary: Dictionary) -> bool:
        """Whether a dictionary's stage can be run and is not committed."""
        place = self._place(dictionary)
        return place is not None and not _is_whole(place.folder)

    def add(self, dictionary: Dictionary | None, wait: bool | None) -> None:
        """Take the lease of a dictionary's stage, unless it is committed already.

        Args:
            dictionary: Whose.
            wait: Wait where another run leads it, or refuse; None leaves it to the other run.
        """
        place = self._place(dictionary)
        assert place is not None, f"{label(self._stage, dictionary)} comes before what it needs"
        folder = place.folder
        committed = _whole(folder, self._emit)
        if committed is not None:
            skipped = StageCommitted(folder.label, 0.0, committed.record.digest, str(folder.path), skipped=True)
            self._emit(skipped)
            self._committed[folder.label] = committed
            return
        folder.claim(spec(self._stage, place.params, place.digests))
        try:
            lease = leases.take(
                folder.path,
                folder.label,
                self._manifest.compute.lease_seconds,
                bool(wait),
                functools.partial(_tell, self._emit, folder.label),
                functools.partial(self._stop, folder.label),
                functools.partial(_is_whole, folder),
            )
        except BusyError:
            if wait is None:
                return
            raise
        if lease is not None:
            self._led.append((place, self._stack.enter_context(lease)))
            return
        committed = folder.committed()
        assert committed is not None, f"{folder.label} was committed by another run, and then was not"
        self._committed[folder.label] = committed

    def finish(self) -> dict[str, Committed]:
        """Do what there is to do, and commit it; all that was added, by label.

        Raises:
            KilobasisError: one of them failed. The others are committed.
        """
        if not self._led:
            return self._committed
        began, jobs = time.monotonic(), []
        for place, lease in self._led:
            folder = place.folder
            self._emit(StageStarted(folder.label, 0, 1, str(folder.path)))
            out = StageOut(folder, self._pool.open(), self._manifest.compute, self._emit, lease.record.nonce)
            inputs = {need: committed.without_units() for need, committed in place.inputs.items()}
            jobs.append(Job(inputs, place.params, out))
        failures = []
        for (place, lease), job, made in zip(self._led, jobs, self._run(jobs), strict=True):
            if isinstance(made, KilobasisError):
                failures.append(made)
            else:
                self._commit(place, lease, job.out, made, time.monotonic() - began)
        if failures:
            raise failures[0]
        return self._committed

    def _run(self, jobs: list[Job]) -> Sequence[Outputs | KilobasisError]:
        if len(jobs) == 1:
            return [self._stage.run(*jobs[0])]
        assert self._stage.together is not None
        return self._stage.together.run(jobs)

    def _commit(self, place: _Place, lease: leases.Lease, out: Out, made: Outputs, seconds: float) -> None:
        assert isinstance(out, StageOut)
        folder, peak = place.folder, max(out.peak_memory, 0)
        committed = folder.commit(made, out.records, place.digests, seconds, peak, lease.read_log)
        self._emit(StageCommitted(folder.label, seconds, committed.record.digest, str(folder.path)))
        self._committed[folder.label] = committed

    def _place(self, dictionary: Dictionary | None) -> _Place | None:
        inputs = planning.inputs_of(self._stage, dictionary, self._done)
        if inputs is None:
            return None
        params = self._stage.params(self._manifest, dictionary, self._sources)
        digests = {need: committed.record.digest for need, committed in inputs.items()}
        identity = fingerprint(spec(self._stage, params, digests))
        return _Place(self._workspace.folder(self._stage, dictionary, identity), params, inputs)


def _whole(folder: StageFolder, emit: Callable[[Event], None]) -> Committed | None:
    """The stage, if it is committed and has everything that its record names."""
    committed = folder.committed()
    if committed is None:
        return None
    missing = folder.missing(committed)
    if not missing:
        return committed
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    emit(Note(folder.label, f"committed, but {', '.join(missing[:3])}{more} are missing: they are made again"))
    return None


def _is_whole(folder: StageFolder) -> bool:
    committed = folder.committed()
    return committed is not None and not folder.missing(committed)


def _tell(emit: Callable[[Event], None], stage: str, text: str) -> None:
    emit(Note(stage, text))


class _LazyPool:
    """Starts the pool when the first stage really runs, so that a run with nothing to do starts no Ray.

    Args:
        compute: What it runs on.
        stack: Ends it.
        joined: Called once a cluster was joined; raises where it cannot do the work.
    """

    def __init__(self, compute: Compute, stack: ExitStack, joined: Callable[[], None]) -> None:
        self._compute, self._stack, self._joined = compute, stack, joined
        self._pool: Pool | None = None

    def open(self) -> Pool:
        if self._pool is None:
            self._pool = self._start()
            self._stack.callback(self._pool.close)
        return self._pool

    def _start(self) -> Pool:
        compute = self._compute
        if compute.pool == "inline":
            return InlinePool(compute.attempts)
        from cluster.ray_cluster import ray_session

        cpus = max(compute.workers * compute.threads, compute.sharding.ranks * compute.rank_threads)
        self._stack.enter_context(ray_session(compute.address, cpus))
        # Imports ray, which must not happen before the session has set its environment.
        from cluster.ray_pool import RayPool

        # Ray has put in handlers of its own, which abort the process.
        if _stopper is not None:
            _stopper.arm()
        if compute.address is not None:
            self._joined()
        return RayPool(compute.workers, compute.attempts, compute.unit_seconds, compute.rank_seconds)


_SIGNALS = (signal.SIGTERM, signal.SIGINT)

# A main thread that does not end after so long is ended.
LAST_SECONDS = 30.0


class _Stopper:
    """Turns signals, and the loss of a lease, into a wish that the main thread grants where it is safe."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._signals = 0

    def signalled(self, number: int, _frame: Any) -> None:
        self._signals += 1
        error = InterruptedRunError(
            f"stopped by {signal.Signals(number).name}; everything committed is kept",
            "continue with `kilobasis resume`",
        )
        if self._signals == 1:
            interruption.request(error)
        elif self._signals == 2:
            # Somebody is in a hurry. Not a third time: that would break off the clearing up.
            raise error

    def lost(self, stage: str, why: str) -> None:
        """Called from the lease's thread."""
        interruption.request(
            FencedError(f"{stage}: the lease was lost: {why}", "look with `kilobasis status`, resume if need be")
        )
        if not self._ended.wait(LAST_SECONDS):
            os._exit(FencedError.exit_code)

    def arm(self) -> None:
        for number in _SIGNALS:
            signal.signal(number, self.signalled)

    def end(self) -> None:
        self._ended.set()
        interruption.clear()


_stopper: _Stopper | None = None


@contextmanager
def _interruptible() -> Iterator[Callable[[str, str], None]]:
    """Turn SIGTERM and SIGINT into an error that unwinds, so that workers are stopped and logs closed.

    Only in the main thread, where Python allows it. Yields what to call when a lease is lost.
    """
    global _stopper
    stopper = _Stopper()
    if threading.current_thread() is not threading.main_thread():
        yield stopper.lost
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    stopper.arm()
    _stopper = stopper
    try:
        yield stopper.lost
    finally:
        _stopper = None
        stopper.end()
        for number, handler in before.items():
            signal.signal(number, handler)
