"""Who leads a stage: a lease in its log, and heartbeats that show that the owner lives.

A lease spares double work. It is no lock, and nothing depends on it but the training log, whose slots fence
by themselves: a run that lost its lease unseen can only repeat work that is then thrown away.

Heartbeats are counters, read on the observer's own clock, so that no two machines have to agree on the time.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from cluster import interruption
from cluster.processes import birth
from cluster.storage.attempts import patience, reason
from cluster.storage.create import replace
from cluster.storage.objects import read_json
from cluster.storage.path import StoragePath
from jobs.log import SlotLog
from schemas.errors import BusyError, IntegrityError
from schemas.layouts import beat_key
from schemas.records import LeaseRecord, Owner

BEATS_PER_LEASE = 6
TELL_SECONDS = 15.0

_LOG = logging.getLogger("kilobasis.lease")


def this_process() -> Owner:
    """This process, so that nobody takes another one for it: not after a reboot, nor in another container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        namespace = os.readlink("/proc/self/ns/pid")  # noqa: PTH115 - it is no path
    except OSError:
        boot, namespace = str(psutil.boot_time()), ""
    return Owner(
        host=socket.gethostname(),
        boot=boot,
        namespace=namespace,
        pid=os.getpid(),
        started=birth(psutil.Process()),
    )


def state(owner: Owner) -> str:
    """What is known of an owner from here: "dead", "alive", "stopped", or "unknown" of another machine's."""
    ours = this_process()
    if (owner.host, owner.boot, owner.namespace) != (ours.host, ours.boot, ours.namespace):
        return "unknown"
    try:
        if not 0 < owner.pid < 2**31:
            return "dead"
        process = psutil.Process(owner.pid)
        if abs(birth(process) - owner.started) > 1.0 or process.status() == psutil.STATUS_ZOMBIE:
            return "dead"
        return "stopped" if process.status() == psutil.STATUS_STOPPED else "alive"
    except psutil.NoSuchProcess:
        return "dead"


class Lease:
    """A lease that was taken. As a context manager it beats, and is given back in the end.

    Args:
        log: The stage's log, with the lease as its newest.
        record: The lease.
        seconds: Silence after which others may take over.
        lost: Called once, from another thread, with a reason, when the lease was lost.
    """

    def __init__(self, log: SlotLog, record: LeaseRecord, seconds: float, lost: Callable[[str], None]) -> None:
        self.record = record
        self._log, self._seconds, self._lost = log, seconds, lost
        self._beat, self._ended = 0, threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def read_log(self) -> SlotLog:
        """The stage's log as it is now.

        Raises:
            FencedError: another run leads the stage.
        """
        log = SlotLog(self._log.path)
        log.refresh()
        log.require_lease(self.record.nonce)
        return log

    def __enter__(self) -> Self:
        self._show(released=False)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join(self._seconds)
        try:
            with patience(self._seconds / BEATS_PER_LEASE):
                self._show(released=True)
        except Exception as failure:  # noqa: BLE001 - the others find out by themselves, and the work is done
            _LOG.warning("the lease could not be given back: %s", reason(failure))

    def _show(self, released: bool) -> None:
        self._beat += 1
        body = json.dumps({"counter": self._beat, "released": released, "seconds": self._seconds}).encode()
        replace(self._log.path / beat_key(self.record.epoch, self.record.nonce), body)

    def _keep(self) -> None:
        acknowledged = time.monotonic()
        while not self._ended.wait(self._seconds / BEATS_PER_LEASE):
            try:
                with patience(self._seconds / BEATS_PER_LEASE):
                    self._show(released=False)
                    self._log.refresh()
            except Exception as error:  # noqa: BLE001 - whatever it was, this thread alone can tell the run of it
                if time.monotonic() - acknowledged > self._seconds:
                    self._lost(f"no sign of life could be written for {self._seconds:.0f} s ({reason(error)})")
                    return
                continue
            acknowledged = time.monotonic()
            lease = self._log.lease
            assert lease is not None
            if lease.nonce != self.record.nonce and not self._ended.is_set():
                self._lost(f"taken over by {lease.owner.host}, process {lease.owner.pid}")
                return


def take(
    path: StoragePath,
    stage: str,
    seconds: float,
    wait: bool,
    tell: Callable[[str], None],
    lost: Callable[[str], None],
    finished: Callable[[], bool],
) -> Lease | None:
    """Take the lease of a stage.

    Args:
        path: The stage's folder.
        stage: Its label.
        seconds: Silence after which an owner counts as gone.
        wait: Wait while another run leads the stage, instead of raising.
        tell: Called with a sentence when there is waiting.
        lost: See `Lease`.
        finished: Whether the stage was committed meanwhile.

    Returns:
        The lease; None if the other run finished the stage.

    Raises:
        BusyError: another run leads the stage, and `wait` is off.
        IntegrityError: the log is damaged.
    """
    log = SlotLog(path)
    log.refresh()
    while True:
        holder = log.lease
        if holder is not None and not is_over(log, holder, stage, seconds, wait, tell, finished):
            log.refresh()
            if finished():
                return None
            continue
        record = log.take(this_process())
        if record is not None:
            return Lease(log, record, seconds, lost)


def is_over(
    log: SlotLog,
    holder: LeaseRecord,
    stage: str,
    seconds: float,
    wait: bool,
    tell: Callable[[str], None],
    finished: Callable[[], bool],
) -> bool:
    """Whether a lease may be taken over; waits for as long as it takes to know. False: look again.

    Raises:
        BusyError: its owner is alive, and `wait` is off.
    """
    if holder.owner == this_process():
        # Left by this very process, which is done with it: a repair puts a lease where one was lost.
        return True
    who = f"{holder.owner.host}, process {holder.owner.pid}"
    seen: Beat | None = None
    first, since, told = True, time.monotonic(), 0.0
    while True:
        of = state(holder.owner)
        # What cannot be read for a moment is no news.
        beat = read_beat(log.path, holder) or seen
        if of == "dead" or (beat and beat.released):
            return True
        if not wait and ((first and of == "alive") or (seen and beat != seen)):
            raise BusyError(
                f"{stage} is being run by {who} (lease {holder.epoch}, alive)",
                "wait for it, or run with --on-busy wait, which goes on when that run ends or dies",
            )
        now = time.monotonic()
        if first or beat != seen:
            seen, since, first = beat, now, False
        # An owner that beats more slowly than we would has said so.
        patient = max(seconds, seen.seconds if seen else 0.0)
        if now - since > patient:
            return True
        if now - told > TELL_SECONDS:
            told = now
            left = max(0.0, patient - (now - since))
            tell(f"led by {who} (lease {holder.epoch}); taking over when it shows no sign of life for {left:.0f} s")
        interruption.check()
        time.sleep(min(1.0, seconds / 20))
        log.refresh()
        if log.lease is not holder or finished():
            return False


def is_held(path: StoragePath) -> bool:
    """Whether a stage may be being run, as far as can be told at a glance: its lease was not given back.

    Args:
        path: The stage's folder.
    """
    log = SlotLog(path)
    try:
        log.refresh()
    except IntegrityError:
        # Nobody can tell before it is repaired.
        return True
    if log.lease is None or state(log.lease.owner) == "dead":
        return False
    beat = read_beat(path, log.lease)
    return beat is None or not beat.released


@dataclass(frozen=True, slots=True)
class Beat:
    """An owner's sign of life: its number, whether it is the last, and the silence that the owner may keep."""

    counter: int
    released: bool
    seconds: float


def read_beat(path: StoragePath, lease: LeaseRecord) -> Beat | None:
    """The newest sign of life of a lease's owner; None where none was given yet, or none can be read now.

    Args:
        path: The stage's folder.
        lease: The lease.
    """
    try:
        found = read_json(path / beat_key(lease.epoch, lease.nonce))
        counter, released = int(found["counter"]), bool(found["released"])
    except (FileNotFoundError, IntegrityError, KeyError, TypeError, ValueError, OverflowError):
        # Not written yet, or caught half-written by a weak store.
        return None
    seconds = found.get("seconds")
    known = isinstance(seconds, (int, float)) and math.isfinite(seconds)
    return Beat(counter, released, float(seconds) if known else 0.0)
