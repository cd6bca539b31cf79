"""Runs a plan: stage after stage, each committed before the next begins."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from cluster.pool import InlinePool, Pool
from cluster.storage.create import create
from jobs import plan as planning
from jobs.fingerprint import fingerprint, spec
from jobs.out import StageOut
from jobs.progress import Watchers
from jobs.sources import survey
from jobs.workspace import PROCESS, Workspace, label
from pipeline.stage import Committed, Sources
from schemas.errors import InterruptedRunError
from schemas.events import Event, StageCommitted, StageStarted
from schemas.manifest import Compute, Manifest


def run(manifest: Manifest, resume: bool = False) -> dict[str, Committed]:
    """Run everything that is not committed.

    Args:
        manifest: What to run.
        resume: Refuse to start anything new.

    Returns:
        Every stage, by label.

    Raises:
        KilobasisError: see `schemas.errors` for each kind and its exit code.
    """
    workspace = Workspace.of(manifest)
    if resume:
        workspace.require_unchanged()
    sources = survey(manifest)
    planned = planning.make(manifest, workspace, sources)
    planning.refuse(planned, manifest, workspace)
    workspace.claim()
    folder = workspace.new_run()
    create(folder / PROCESS, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode())
    with _interruptible(), Watchers(folder) as emit, ExitStack() as stack:
        return _run_stages(manifest, workspace, planned.sources, emit, _LazyPool(manifest.compute, stack))


def _run_stages(
    manifest: Manifest, workspace: Workspace, sources: Sources, emit: Callable[[Event], None], pool: _LazyPool
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
        committed = folder.committed()
        if committed is not None:
            emit(StageCommitted(name, 0.0, committed.record.digest, str(folder.path), skipped=True))
        else:
            folder.claim(specification)
            began = time.monotonic()
            emit(StageStarted(name, 0, 1, str(folder.path)))
            out = StageOut(folder, pool.open(), manifest.compute, emit)
            outputs = stage.run(inputs, params, out)
            committed = folder.commit(outputs, out.records, digests, time.monotonic() - began, max(out.peak_memory, 0))
            emit(StageCommitted(name, time.monotonic() - began, committed.record.digest, str(folder.path)))
        done[name] = committed
        if stage.name == "tokenize":
            # Only now the number of rows is known, so what was planned from an estimate is checked again.
            sources = planning.refine(sources, committed)
            planning.refuse(planning.make(manifest, workspace, sources), manifest, workspace)
    return done


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
            return InlinePool()
        from cluster.ray_cluster import ray_session

        cpus = max(compute.workers * compute.threads, compute.ranks * compute.rank_threads)
        self._stack.enter_context(ray_session(compute.address, cpus))
        # Imports ray, which must not happen before the session has set its environment.
        from cluster.ray_pool import RayPool

        # Ray has put in handlers of its own, which abort the process.
        if threading.current_thread() is threading.main_thread():
            _arm()
        return RayPool(compute.workers, compute.retries)


_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def _stop(number: int, _frame: Any) -> None:
    # Only the first counts: a second one must not break off the clearing up.
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise InterruptedRunError(
        f"stopped by {signal.Signals(number).name}; everything committed is kept", "continue with `kilobasis resume`"
    )


def _arm() -> None:
    for number in _SIGNALS:
        signal.signal(number, _stop)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Turn SIGTERM and SIGINT into an error that unwinds, so that workers are stopped and logs closed.

    Only in the main thread, where Python allows it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    _arm()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
