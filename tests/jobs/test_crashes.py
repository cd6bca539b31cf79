"""Runs that are killed, twice killed, stopped and woken, or raced, at chosen operations of their store."""

import contextlib
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import psutil
import pytest

from cluster.storage.objects import forget
from cluster.storage.path import StoragePath
from jobs import repair as repairs
from tests.support import dying, runs
from tests.support.dying import DOOR, HOLD, LEASE, START, Point
from tests.support.stores import reach

T = TypeVar("T")

SEED = int(os.environ.get("KILOBASIS_CHAOS_SEED", random.SystemRandom().randrange(10**6)))
PLACES = ("file", "ceph")
# A run in a bucket takes longer.
MANY = pytest.mark.parametrize(
    ("place", "number"),
    [
        ("file", 7),
        ("ceph", 3),
        pytest.param("file", 100, marks=[pytest.mark.chaos, pytest.mark.timeout(7200)]),
        pytest.param("ceph", 100, marks=[pytest.mark.chaos, pytest.mark.timeout(7200)]),
    ],
    indirect=["place"],
)
# Nobody dies of those that race, but eight of them on a few cores may not show a sign of life for seconds.
RACING = ("compute.lease_seconds=15", "compute.checkpoint_seconds=1e-9")
QUICK = ("compute.lease_seconds=1", "compute.checkpoint_seconds=1e-9")


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a fresh root: in a folder, or in a bucket of a real store."""
    if request.param == "file":
        yield str(tmp_path / "root")
    else:
        yield str(reach(request.getfixturevalue(request.param).bucket(), monkeypatch) / "root")
        forget()


@pytest.fixture(scope="module")
def expected(finished: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The manifest, its digests, and how many operations a run has, in all and from two landmarks on."""
    folder = tmp_path_factory.mktemp("expected")
    going = dying.start(finished.manifest, *QUICK, f"root={folder / 'root'}", log=folder / "log")
    assert going.wait() == 0, going.log.read_text()
    assert runs.digests(folder / "root") == runs.digests(finished.root)
    return SimpleNamespace(
        manifest=finished.manifest,
        digests=runs.digests(finished.root),
        operations=operations(going.log),
        behind_door=operations(going.log, DOOR),
        behind_lease=operations(going.log, LEASE),
    )


def begin(expected: SimpleNamespace, place: str, log: Path, **options: Any) -> dying.Going:
    return dying.start(expected.manifest, *QUICK, f"root={place}", log=log, **options)


def beside(case: Callable[[int], T], count: int) -> list[T]:
    """Every case, two at a time: much of it is waiting for a store."""
    with ThreadPoolExecutor(2) as executor:
        return list(executor.map(case, range(count)))


def check(expected: SimpleNamespace, place: str) -> None:
    """All is committed, once, with the digests of a run that nothing happened to."""
    root = StoragePath.parse(place)
    found = list(repairs.verify(root, full=True))
    assert [finding for each in found for finding in each.findings] == []
    assert {each.label: each.committed.digest for each in found if each.committed} == expected.digests
    assert len(found) == len(expected.digests)


def begun(place: str) -> set[str]:
    """Units of which something was written, but no record: what a resume has to do again."""
    found = set()
    for each in repairs.verify(StoragePath.parse(place), full=False):
        for key in each.unreferenced():
            # A temporary file has a dot in front, and a random name behind.
            named = re.search(r"/c/\.?(\d+)|(?:^|/)\.?(\d{6})", key)
            # What a stage writes itself, and a temporary file of a record or a heartbeat, is no work of a unit.
            if named and not key.startswith(("checkpoints/", "log/", "units/", "beats/", ".")):
                found.add(f"{each.label} {int(named[1] or named[2])}")
    return found


def points(number: int, operations: int, salt: str) -> list[Point]:
    """So many points, spread at random over a run."""
    rng = random.Random(f"{SEED} {salt}")
    every = [Point(at, when) for at in range(1, operations + 1) for when in ("before", "after")]
    return sorted(rng.sample(every, min(number, len(every))), key=lambda point: point.number)


def until_struck(expected: SimpleNamespace, place: str, log: Path, point: Point) -> tuple[str, dying.Going]:
    """A run that met its point, and its root; begun again elsewhere if it ended before.

    A training writes as many checkpoints as it finds time for, so one run has a few operations more than another.
    """
    rng = random.Random(f"{SEED} {place.rpartition('/')[2]} {point}")
    for attempt in range(5):
        root, going = f"{place}-{attempt}", begin(expected, f"{place}-{attempt}", log, point=point)
        if point.number_of_signal == signal.SIGSTOP and stopped(going):
            return root, going
        code = going.wait()
        if code == -signal.SIGKILL:
            return root, going
        assert code == 0, f"seed {SEED}, {point}: {log.read_text()}"
        check(expected, root)
        point = replace(point, number=rng.randint(1, operations(log, point.behind)))
    raise AssertionError(f"seed {SEED}: no run came to its {point.number}th operation: {log.read_text()}")


def operations(log: Path, behind: str = START) -> int:
    """How many a run had that has ended, from a landmark on."""
    return int(log.read_text().rpartition("operations ")[2].split()[dying.LANDMARKS.index(behind)])


@pytest.mark.parametrize("place", PLACES, indirect=True)
@pytest.mark.parametrize("every", [False, pytest.param(True, id="all", marks=pytest.mark.chaos)])
@pytest.mark.timeout(7200)
def test_run_killed_around_a_storage_operation_resumes_to_the_same_digests(
    every: bool, place: str, expected: SimpleNamespace, tmp_path: Path
) -> None:
    """SIGKILL before or after operations that change the store: before a read, it is as after the last of them."""
    few = 20 if "://" not in place else 6
    chosen = points(10**6 if every else few, expected.operations, place.partition("://")[0])
    print(f"\nseed {SEED}: {len(chosen)} of {2 * expected.operations} points", file=sys.stderr)

    def die_at(index: int) -> None:
        point, log = chosen[index], tmp_path / f"log-{index}"
        root, _ = until_struck(expected, f"{place}-{index}", log, point)
        assert len(begun(root)) <= 1, f"seed {SEED}, {point}: more than one unit has to be made again"
        assert begin(expected, root, log).wait() == 0, f"seed {SEED}, {point}: {log.read_text()}"
        check(expected, root)

    beside(die_at, len(chosen))


def stopped(going: dying.Going) -> bool:
    """Wait until a signal has stopped a run; whether it did not end first.

    Raises:
        AssertionError: it failed, or neither comes.
    """
    deadline = time.monotonic() + 60
    while going.runs():
        # It may end between being asked whether it runs and how.
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(going.process.pid).status() == psutil.STATUS_STOPPED:
                return True
        assert time.monotonic() < deadline, going.log.read_text()
        time.sleep(0.01)
    assert going.wait() == 0, going.log.read_text()
    return False


@MANY
def test_run_killed_again_while_it_resumes_reaches_the_same_digests(
    number: int, place: str, expected: SimpleNamespace, tmp_path: Path
) -> None:
    """Both times behind the door: where the store is probed, there is nothing yet to be damaged."""
    rngs = [random.Random(f"{SEED} twice {place.partition('://')[0]} {index}") for index in range(number)]

    def die_twice(index: int) -> None:
        log = tmp_path / f"log-{index}"
        for attempt in range(10):
            root = f"{place}-{index}-{attempt}"
            if died_twice(expected, root, log, rngs[index]):
                assert begin(expected, root, log).wait() == 0, f"seed {SEED}: {log.read_text()}"
                check(expected, root)
                return
        raise AssertionError(f"seed {SEED}: no run died twice: {log.read_text()}")

    beside(die_twice, number)


def died_twice(expected: SimpleNamespace, root: str, log: Path, rng: random.Random) -> bool:
    """Whether a run and its resume both came to a point where they died; a resume may have less to do than thought."""
    first = rng.randint(1, expected.behind_door)
    for number in (first, rng.randint(1, max(1, expected.behind_door - first))):
        point = Point(number, rng.choice(["before", "after"]), behind=DOOR)
        code = begin(expected, root, log, point=point).wait()
        if code == 0:
            check(expected, root)
            return False
        assert code == -signal.SIGKILL, f"seed {SEED}, {point}: {log.read_text()}"
    return True


@MANY
def test_run_stopped_beyond_its_lease_and_woken_overwrites_nothing(
    number: int, place: str, expected: SimpleNamespace, tmp_path: Path
) -> None:
    """A zombie: SIGSTOP at an operation, another run takes over and finishes, SIGCONT."""
    rng = random.Random(f"{SEED} zombie {place.partition('://')[0]}")
    moments = [
        Point(rng.randint(1, expected.behind_lease), rng.choice(["before", "after"]), signal.SIGSTOP, LEASE)
        for _ in range(number)
    ]

    def sleep_at(index: int) -> int:
        point, log = moments[index], tmp_path / f"log-{index}"
        root, zombie = until_struck(expected, f"{place}-{index}", tmp_path / f"zombie-{index}", point)
        assert begin(expected, root, log, wait=True).wait() == 0, log.read_text()
        before = {each.path: dict(each.present) for each in repairs.verify(StoragePath.parse(root), full=False)}
        psutil.Process(zombie.process.pid).send_signal(signal.SIGCONT)
        code = zombie.wait()
        assert code in (0, 70, 75), f"seed {SEED}, {point}: {zombie.log.read_text()}"
        check(expected, root)
        for each in repairs.verify(StoragePath.parse(root), full=False):
            for key, was in before[each.path].items():
                # The zombie's own temporary file is no object, and goes when it wakes. A checkpoint that is superseded
                # anybody may delete, however late.
                if "beats/" in key or key.endswith(".tmp") or (key in each.superseded and key not in each.present):
                    continue
                assert each.present[key] == was, f"{each.path / key} was overwritten"
        return code

    endings = Counter(beside(sleep_at, number))
    print(f"\nseed {SEED}: {number} zombies ended with {dict(endings)}", file=sys.stderr)
    # Most do. One that wakes near its end may find that nothing is left to do; three might all be such.
    assert endings[70] >= number // 4, f"seed {SEED}: hardly a zombie was told that its lease was gone"


@pytest.mark.parametrize("count", [2, 4, 8])
@pytest.mark.parametrize(
    ("place", "number"),
    [
        ("file", 3),
        ("ceph", 1),
        pytest.param("file", 40, marks=[pytest.mark.chaos, pytest.mark.timeout(7200)]),
        pytest.param("ceph", 30, marks=[pytest.mark.chaos, pytest.mark.timeout(7200)]),
    ],
    indirect=["place"],
)
def test_runners_at_once_commit_everything_once(
    count: int, number: int, place: str, expected: SimpleNamespace, tmp_path: Path
) -> None:
    for index in range(number):
        root = f"{place}-{index}"
        every = [
            dying.start(expected.manifest, *RACING, f"root={root}", log=tmp_path / f"log-{each}", wait=True)
            for each in range(count)
        ]
        codes = [going.wait() for going in every]
        assert codes == [0] * count, [going.log.read_text()[-2000:] for going in every]
        check(expected, root)


@pytest.mark.parametrize("place", PLACES, indirect=True)
def test_second_runner_is_told_that_the_first_one_is_alive(
    place: str, expected: SimpleNamespace, tmp_path: Path
) -> None:
    """The first one is held in the middle of its work, while its lease goes on beating."""
    first = begin(expected, place, tmp_path / "first", point=Point(2, "before", HOLD, LEASE))
    first.wait_until_held()
    second = begin(expected, place, tmp_path / "log")
    assert second.wait() == 75, second.log.read_text()
    said = second.log.read_text()
    assert re.search(rf"BusyError: tokenize is being run by \S+, process {first.process.pid} ", said), said
    assert "--on-busy wait" in said
    first.go_on()
    assert first.wait() == 0, first.log.read_text()
    check(expected, place)


def test_lease_of_a_dead_process_is_taken_over_at_once(expected: SimpleNamespace, tmp_path: Path) -> None:
    place = str(tmp_path / "root")
    slow = "compute.lease_seconds=600"
    manifest = expected.manifest
    going = dying.start(manifest, f"root={place}", slow, log=tmp_path / "log", point=Point(12))
    assert going.wait() == -signal.SIGKILL
    began = time.monotonic()
    assert dying.start(manifest, f"root={place}", slow, log=tmp_path / "log").wait() == 0
    assert time.monotonic() - began < 100
    check(expected, place)
