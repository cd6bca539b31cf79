"""Runs a plan: stage after stage, each committed before the next begins."""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from cluster import interruption
from cluster.pool import InlinePool, Pool
from cluster.storage.create import create
from jobs import lease as leases
from jobs import plan as planning
from jobs.fingerprint import fingerprint, spec
from jobs.mesh import resolved
from jobs.out import StageOut
from jobs.progress import Watchers
from jobs.sources import survey
from jobs.state import StageFolder
from jobs.workspace import PROCESS, Workspace, label
from pipeline.stage import Committed, Sources
from schemas.errors import FencedError, InterruptedRunError
from schemas.events import Event, Note, StageCommitted, StageStarted
from schemas.manifest import Compute, Manifest
from schemas.records import canonical_json


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
    workspace = Workspace.of(manifest)
    if resume:
        workspace.require_unchanged()
    sources = survey(manifest)
    manifest = resolved(manifest, sources)
    planned = planning.make(manifest, workspace, sources)
    planning.refuse(planned, manifest, workspace)
    workspace.claim(manifest.compute.single_writer)
    folder = workspace.new_run()
    create(folder / PROCESS, canonical_json(leases.this_process().model_dump()) + b"\n")
    with _interruptible() as stop, Watchers(folder) as emit, ExitStack() as stack:
        pool = _LazyPool(manifest.compute, stack)
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
        name = label(stage, dictionary)
        inputs = planning.inputs_of(stage, dictionary, done)
        assert inputs is not None, f"{name} comes before what it needs"
        params = stage.params(manifest, dictionary, sources)
        digests = {need: committed.record.digest for need, committed in inputs.items()}
        specification = spec(stage, params, digests)
        folder = workspace.folder(stage, dictionary, fingerprint(specification))
        committed = _whole(folder, emit)
        if committed is None:
            folder.claim(specification)
            tell = functools.partial(_tell, emit, name)
            finished = functools.partial(_is_whole, folder)
            lease = leases.take(
                folder.path, name, manifest.compute.lease_seconds, wait, tell, functools.partial(stop, name), finished
            )
            if lease is not None:
                with lease:
                    began = time.monotonic()
                    emit(StageStarted(name, 0, 1, str(folder.path)))
                    out = StageOut(folder, pool.open(), manifest.compute, emit, lease.record.nonce)
                    outputs = stage.run(inputs, params, out)
                    seconds = time.monotonic() - began
                    peak = max(out.peak_memory, 0)
                    committed = folder.commit(outputs, out.records, digests, seconds, peak, lease.read_log())
                    emit(StageCommitted(name, seconds, committed.record.digest, str(folder.path)))
            else:
                committed = folder.committed()
        else:
            emit(StageCommitted(name, 0.0, committed.record.digest, str(folder.path), skipped=True))
        assert committed is not None, f"{name} was committed by another run, and then was not"
        done[name] = committed
        if stage.name == "tokenize":
            # Only now the number of rows is known, so what was planned from an estimate is checked again.
            sources = planning.refine(sources, committed)
            planning.refuse(planning.make(manifest, workspace, sources), manifest, workspace, started=True)
    return done


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
    """Starts the pool when the first stage really runs, so that a run with nothing to do starts no Ray."""

    def __init__(self, compute: Compute, stack: ExitStack) -> None:
        self._compute, self._stack = compute, stack
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
        return RayPool(compute.workers, compute.attempts)


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
