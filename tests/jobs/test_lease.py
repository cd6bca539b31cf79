"""Leases: when an owner counts as gone, and what ends the thread that shows its signs of life."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.storage.create import replace
from cluster.storage.path import StoragePath
from jobs import lease as leases
from jobs.lease import Lease
from jobs.log import SlotLog
from schemas.errors import BusyError
from schemas.layouts import beat_key
from schemas.records import LeaseRecord, Owner

ELSEWHERE = Owner(host="elsewhere.invalid", boot="b", namespace="n", pid=7, started=1.0)


@pytest.fixture
def log(tmp_path: Path) -> SlotLog:
    """A log with a lease of a process on another machine."""
    made = SlotLog(StoragePath.parse(tmp_path / "stage"))
    assert made.take(ELSEWHERE)
    return made


def beat(log: SlotLog, **fields: Any) -> None:
    assert log.lease is not None
    replace(log.path / beat_key(log.lease.epoch, log.lease.nonce), json.dumps(fields).encode())


def judged(log: SlotLog, seconds: float, wait: bool = True, tell: Callable[[str], None] = str) -> bool:
    assert log.lease is not None
    return leases.is_over(log, log.lease, "harvest", seconds, wait, tell, finished=lambda: False)


class TestOwnersTime:
    """An owner that beats slowly is not taken for dead by somebody in a hurry."""

    def test_observer_waits_for_as_long_as_the_owner_said(self, log: SlotLog) -> None:
        beat(log, counter=3, released=False, seconds=1.2)
        told: list[str] = []
        began = time.monotonic()
        assert judged(log, 0.2, tell=told.append)
        assert 1.2 <= time.monotonic() - began < 60
        assert "for 1 s" in told[0]

    def test_observer_with_more_patience_than_the_owner_keeps_it(self, log: SlotLog) -> None:
        beat(log, counter=3, released=False, seconds=0.1)
        began = time.monotonic()
        assert judged(log, 0.8)
        assert time.monotonic() - began >= 0.8

    @pytest.mark.parametrize("seconds", [{}, {"seconds": "long"}, {"seconds": float("inf")}, {"seconds": None}])
    def test_beat_without_a_time_is_judged_by_the_observers(self, seconds: dict[str, Any], log: SlotLog) -> None:
        beat(log, counter=3, released=False, **seconds)
        began = time.monotonic()
        assert judged(log, 0.4)
        assert 0.4 <= time.monotonic() - began < 60

    def test_beats_that_are_given_name_the_owners_time(self, tmp_path: Path) -> None:
        log = SlotLog(StoragePath.parse(tmp_path / "stage"))
        with taken(log, 1200.0) as held:
            there = json.loads((log.path / beat_key(1, held.record.nonce)).local.read_text())
            assert there == {"counter": 1, "released": False, "seconds": 1200.0}
            assert leases.is_held(log.path)
        assert not leases.is_held(log.path)


class TestUnreadableBeat:
    """What cannot be read is no news, neither of life nor of death."""

    def test_beat_that_is_denied_once_is_no_sign_of_life(self, log: SlotLog, monkeypatch: pytest.MonkeyPatch) -> None:
        beat(log, counter=3, released=False)
        answers = iter(["", "deny", ""])
        real = leases.read_json

        def read(path: StoragePath) -> Any:
            if next(answers, "") == "deny":
                raise FileNotFoundError(str(path))
            return real(path)

        monkeypatch.setattr(leases, "read_json", read)
        assert judged(log, 0.5, wait=False)

    def test_beat_that_is_denied_at_first_is_no_sign_of_life(
        self, log: SlotLog, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        beat(log, counter=3, released=False)
        answers = iter(["deny"])
        real = leases.read_json

        def read(path: StoragePath) -> Any:
            if next(answers, "") == "deny":
                raise FileNotFoundError(str(path))
            return real(path)

        monkeypatch.setattr(leases, "read_json", read)
        assert judged(log, 0.5, wait=False)

    def test_next_beat_is_a_sign_of_life(self, log: SlotLog, monkeypatch: pytest.MonkeyPatch) -> None:
        beat(log, counter=3, released=False)
        numbers = iter(range(4, 1000))
        real = leases.read_json

        def read(path: StoragePath) -> Any:
            found = real(path)
            beat(log, counter=next(numbers), released=False)
            return found

        monkeypatch.setattr(leases, "read_json", read)
        with pytest.raises(BusyError, match="harvest is being run by elsewhere"):
            judged(log, 30.0, wait=False)

    def test_owner_that_never_beat_is_gone_in_the_end(self, log: SlotLog) -> None:
        assert judged(log, 0.3, wait=False)


def taken(log: SlotLog, seconds: float, lost: Callable[[str], None] = str) -> Lease:
    log.refresh()
    record = log.take(leases.this_process())
    assert isinstance(record, LeaseRecord)
    return Lease(log, record, seconds, lost)


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError("between mkdir and rename"), json.JSONDecodeError("garbled", "<html>", 0), KeyError("size")],
    ids=lambda error: type(error).__name__,
)
class TestFailingBeats:
    """Whatever a store or its library raises, the owner goes on beating, or is told that it has lost the lease."""

    def test_owner_whose_beats_fail_for_ever_is_told(
        self, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reasons: list[str] = []
        told = threading.Event()

        def lost(reason: str) -> None:
            reasons.append(reason)
            told.set()

        log = SlotLog(StoragePath.parse(tmp_path / "stage"))
        with taken(log, 0.3, lost) as held:
            monkeypatch.setattr(held, "_show", failing(error, 10**6))
            assert told.wait(10)
        assert len(reasons) == 1
        assert type(error).__name__ in reasons[0]

    def test_owner_whose_beat_fails_once_goes_on(
        self, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reasons: list[str] = []
        log = SlotLog(StoragePath.parse(tmp_path / "stage"))
        with taken(log, 1.5, reasons.append) as held:
            broken = failing(error, 1, held._show)
            monkeypatch.setattr(held, "_show", broken)
            deadline = time.monotonic() + 10
            while broken.calls < 3:
                assert held._thread.is_alive()
                assert time.monotonic() < deadline
                time.sleep(0.02)
        assert reasons == []


class failing:  # noqa: N801 - it is called as a function is
    """Raises an error so many times, then does what the real one does."""

    def __init__(self, error: Exception, times: int, real: Callable[..., None] = lambda **_: None) -> None:
        self._error, self._times, self._real = error, times, real
        self.calls = 0

    def __call__(self, released: bool) -> None:
        if released:
            return
        self.calls += 1
        if self.calls <= self._times:
            raise self._error
        self._real(released=released)


def test_lease_that_cannot_be_given_back_does_not_fail_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = SlotLog(StoragePath.parse(tmp_path / "stage"))
    held = taken(log, 3.0)
    with held:
        monkeypatch.setattr(leases, "replace", missing)


def missing(path: StoragePath, _: bytes) -> None:
    raise FileNotFoundError(str(path))
