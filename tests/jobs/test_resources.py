"""Runs that meet a full disk, no descriptor left, a root that nobody may write to, and clocks that jump."""

import functools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from cluster.processes import birth
from cluster.storage.path import StoragePath
from jobs import lease, progress, workspace
from jobs import manifest as manifests
from jobs import repair as repairs
from schemas.errors import IntegrityError, KilobasisError, StorageError
from schemas.events import Note
from tests.support import hardship, runs
from tests.support.command import invoke, snapshot
from tests.support.fixtures import write_manifest
from tests.support.hardship import Disk, Ended, Trouble

SEED = int(os.environ.get("KILOBASIS_CHAOS_SEED", "20261122"))
HOUR = 3600.0

Strike = Callable[["Place"], Callable[[], object]]


@dataclass(frozen=True)
class Place:
    """A root, on a disk of its own where the trouble is one of disks."""

    root: Path
    disk: Disk | None


@dataclass(frozen=True)
class Fault:
    """A kind of trouble.

    Attributes:
        strike: Makes the function that brings it.
        says: What the error line must name of it.
        does: What it must advise.
        mounts: Whether it needs a disk of its own.
    """

    strike: Strike
    says: str
    does: str
    mounts: bool = True


def on_disk(place: Place) -> Disk:
    assert place.disk is not None
    return place.disk


FAULTS = {
    "disk_full": Fault(lambda place: on_disk(place).fill, "No space left on device", "make room"),
    "inodes_used_up": Fault(lambda place: on_disk(place).take_inodes, "No space left on device", "make room"),
    "disk_read_only": Fault(
        lambda place: functools.partial(hardship.make_read_only, place.root),
        "Read-only file system",
        "make the file system writable",
    ),
    "no_permission": Fault(
        lambda place: functools.partial(hardship.forbid, place.root),
        "Permission denied",
        "give this user the permission",
        mounts=False,
    ),
    "no_descriptors": Fault(
        lambda place: hardship.take_descriptors, "Too many open files", "raise the limit of open files", mounts=False
    ),
    "files_limited": Fault(
        lambda place: functools.partial(hardship.limit_files, 30_000), "File too large", "mend the file system", False
    ),
}

# Just before which object it strikes. The first two come before a run is noted, so there is nothing to resume.
MOMENTS = {
    "root_record": r"/root/ROOT\.json",
    "manifest_of_the_run": r"/root/runs/.*/manifest\.json",
    "specification": r"/root/tokenize/.*/SPEC\.json",
    "unit_of_tokens": r"/root/tokenize/.*/units/",
    "events": r"/root/runs/.*/events/",
    "lease": r"/root/harvest/.*/log/",
    "shard": r"/root/harvest/.*/activations\.zarr/.*/c/",
    "harvest": r"/root/harvest/.*/COMMITTED",
    "checkpoint": r"/root/.*/train/.*/checkpoints/",
    "slot": r"/root/.*/train/.*/log/000001",
    "dictionary": r"/root/.*/train/.*/dictionary\.safetensors",
    "metrics": r"/root/.*/evaluate/.*/metrics\.json",
    "report": r"/root/.*/catalog/.*/report\.html",
    "export": r"/root/.*/export/.*/cfg\.json",
}
# The first two come before a run is noted, so there is nothing to resume.
UNNOTED = ("root_record", "manifest_of_the_run")

# In the last of these, nothing that is written is larger than the limit any more.
GRID = [
    (fault, moment)
    for fault in FAULTS
    for moment in MOMENTS
    if not (fault == "files_limited" and moment in ("dictionary", "metrics", "export"))
]
QUICK = [
    ("disk_full", "specification"),
    ("disk_full", "checkpoint"),
    ("inodes_used_up", "shard"),
    ("disk_read_only", "harvest"),
    ("no_permission", "dictionary"),
    ("no_descriptors", "unit_of_tokens"),
    ("files_limited", "report"),
]
CHAOS = 27


@pytest.fixture(scope="module")
def expected(finished: SimpleNamespace) -> dict[str, str]:
    return runs.digests(finished.root)


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """A root; parametrize it indirectly with whether it is on a disk of its own."""
    if not request.param:
        yield Place(tmp_path / "root", None)
        return
    with hardship.mounted(tmp_path / "disk") as disk:
        yield Place(disk.path / "root", disk)


OWN_DISK = pytest.mark.parametrize("place", [pytest.param(True, id="")], indirect=True)


def kilobasis(verb: str, manifest: Path, root: Path, folder: Path, *words: object, **options: Any) -> Ended:
    return hardship.command(verb, manifest, "--set", f"root={root}", *words, folder=folder, **options)


def mend(place: Place) -> None:
    if place.disk:
        place.disk.mend()
    elif place.root.exists():
        hardship.allow(place.root)


def check(root: Path, expected: dict[str, str]) -> None:
    """Everything is committed, whole, and what an undisturbed run makes."""
    assert not repairs.require_root(StoragePath.parse(root))
    assert repairs.findings(StoragePath.parse(root), full=True) == []
    assert runs.digests(root) == expected


def cases() -> list[object]:
    rest = [pair for pair in GRID if pair not in QUICK]
    found = []
    for fault, moment in [*QUICK, *random.Random(f"{SEED} resources").sample(rest, CHAOS)]:
        marks = [] if (fault, moment) in QUICK else [pytest.mark.chaos]
        found.append(pytest.param(FAULTS[fault].mounts, fault, moment, id=f"{fault}-{moment}", marks=marks))
    return found


@pytest.mark.parametrize(("place", "fault", "moment"), cases(), indirect=["place"])
def test_run_that_runs_out_of_something_says_so_and_resumes(
    place: Place, fault: str, moment: str, expected: dict[str, str], finished: SimpleNamespace, tmp_path: Path
) -> None:
    trouble = Trouble(FAULTS[fault].strike(place), MOMENTS[moment])
    ended = kilobasis("run", finished.manifest, place.root, tmp_path / "first", trouble=trouble)
    assert ended.struck, f"seed {SEED}: the run never came to this moment: {ended.err}"
    assert ended.code == 75, ended.err
    assert FAULTS[fault].says in ended.line
    assert FAULTS[fault].does in ended.line
    assert str(place.root) in ended.line
    mend(place)
    verb = "run" if moment in UNNOTED else "resume"
    again = kilobasis(verb, finished.manifest, place.root, tmp_path / "second")
    assert again.code == 0, again.err
    check(place.root, expected)


@pytest.mark.parametrize("moment", ["specification", "shard"])
def test_library_that_gets_no_descriptor_ends_the_run_like_ours(
    moment: str, expected: dict[str, str], finished: SimpleNamespace, tmp_path: Path
) -> None:
    """One is left, which the store opens and closes; whoever wants two, or keeps one, finds none."""
    root = tmp_path / "root"
    trouble = Trouble(functools.partial(hardship.take_descriptors, 1), MOMENTS[moment])
    ended = kilobasis("run", finished.manifest, root, tmp_path / "first", trouble=trouble)
    assert ended.struck
    assert ended.code == 75, ended.err
    assert "Too many open files" in ended.line
    assert "ulimit -n" in ended.line
    again = kilobasis("resume", finished.manifest, root, tmp_path / "second")
    assert again.code == 0, again.err
    check(root, expected)


@OWN_DISK
def test_disk_that_shrinks_while_it_runs_is_no_fault_of_the_manifest(
    place: Place, expected: dict[str, str], finished: SimpleNamespace, tmp_path: Path
) -> None:
    """Planning found room, and when the rows are known there is too little: resume once there is room."""
    trouble = Trouble(functools.partial(on_disk(place).fill, 400_000), MOMENTS["specification"])
    ended = kilobasis("run", finished.manifest, place.root, tmp_path / "first", trouble=trouble)
    assert ended.struck
    assert "make room" in ended.line
    place.disk.mend()
    again = kilobasis("resume", finished.manifest, place.root, tmp_path / "second")
    assert again.code == 0, again.err
    check(place.root, expected)
    assert ended.code == 75


def test_watchers_that_cannot_write_do_not_hide_the_first_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: StoragePath, _body: bytes) -> bool:
        raise StorageError(f"cannot create {path}: No space left on device", "make room, then resume")

    monkeypatch.setattr(progress, "create", refuse)
    with pytest.raises(KilobasisError) as raised, progress.Watchers(StoragePath.parse(tmp_path)) as emit:  # noqa: PT012
        emit(Note("harvest", "something to write"))
        raise IntegrityError("a shard is damaged")
    assert isinstance(raised.value, IntegrityError)


@OWN_DISK
def test_commands_on_a_read_only_root_read_it_and_refuse_to_write(
    place: Place, finished: SimpleNamespace, tmp_path: Path
) -> None:
    shutil.copytree(finished.root, place.root)
    (next((place.root / "harvest").iterdir()) / "leftover").write_text("of a crash")
    damaged = next((place.root / "tokenize").glob("*/train/*.parquet"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    manifest = write_manifest(tmp_path / "tiny.yaml", finished.tree | {"root": str(place.root)})
    hardship.make_read_only(place.root)
    before = snapshot(place.root)
    codes = {
        verb: invoke(*verb.split(), manifest)
        for verb in ("status", "verify", "gc", "gc --delete --older-than 0", "repair", "run", "resume")
    }
    assert snapshot(place.root) == before
    assert {verb: result.code for verb, result in codes.items()} == {
        "status": 0,
        "verify": 4,
        "gc": 4,
        "gc --delete --older-than 0": 75,
        "repair": 75,
        "run": 2,
        "resume": 2,
    }
    for verb in ("gc --delete --older-than 0", "repair"):
        assert "Read-only file system -> make the file system writable" in codes[verb].err
    assert "is not writable" in codes["run"].err


@OWN_DISK
def test_report_of_a_read_only_root_is_given(place: Place, finished: SimpleNamespace, tmp_path: Path) -> None:
    shutil.copytree(finished.root, place.root)
    manifest = write_manifest(tmp_path / "tiny.yaml", finished.tree | {"root": str(place.root)})
    hardship.make_read_only(place.root)
    result = invoke("report", manifest)
    assert result.code == 0, result.err


# Clocks


@pytest.mark.parametrize("hours", [1, -1])
def test_run_whose_clock_jumps_goes_on(
    hours: int, expected: dict[str, str], finished: SimpleNamespace, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    trouble = Trouble(functools.partial(hardship.jump, hours * HOUR), MOMENTS["shard"])
    ended = kilobasis("run", finished.manifest, root, tmp_path / "first", trouble=trouble)
    assert (ended.code, ended.struck) == (0, True), ended.err
    check(root, expected)
    leftovers = repairs.garbage(StoragePath.parse(root), 7 * 86400, print)
    assert [each for each in leftovers if not each.superseded] == []
    assert kilobasis("status", finished.manifest, root, tmp_path / "status").code == 0


@pytest.mark.parametrize("hours", [1, -1])
def test_resume_with_another_clock_than_the_run_goes_on(
    hours: int, expected: dict[str, str], finished: SimpleNamespace, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    killed = Trouble(hardship.kill, MOMENTS["checkpoint"], 2)
    ended = kilobasis("run", finished.manifest, root, tmp_path / "first", trouble=killed)
    assert ended.code == -signal.SIGKILL, ended.err
    jump = functools.partial(hardship.jump, hours * HOUR)
    again = kilobasis("resume", finished.manifest, root, tmp_path / "second", before=jump)
    assert again.code == 0, again.err
    check(root, expected)


@pytest.mark.parametrize("beats", [True, False], ids=["alive", "silent"])
def test_waiting_run_whose_clock_jumps_judges_a_lease_by_its_beats(
    beats: bool, expected: dict[str, str], finished: SimpleNamespace, tmp_path: Path
) -> None:
    """An hour forward must not make an owner dead that beats; an hour back must not make one immortal that does not."""
    root = tmp_path / "root"
    (stage,) = (finished.root / "tokenize").iterdir()
    path = StoragePath.parse(root / "tokenize" / stage.name)
    workspace.Workspace.of(manifests.load(finished.manifest, [f"root={root}"])).claim()
    held = lease.take(path, "tokenize", 1.0, False, lambda _: None, lambda _: None, finished=lambda: False)
    assert held is not None
    # Both this process and the waiting one would know at once that it is alive.
    waiting = functools.partial(hardship.jump_later, 0.5, HOUR if beats else -HOUR)
    began = time.monotonic()
    with ThreadPoolExecutor(1) as executor:
        run = functools.partial(kilobasis, "run", finished.manifest, root, tmp_path / "second", before=waiting)
        words = ("--on-busy", "wait", "--set", "compute.lease_seconds=1")
        with held if beats else nullcontext():
            ended = executor.submit(run, *words)
            if beats:
                # On a busy machine a process takes seconds to begin: one that comes later finds a lease let go.
                while not (root / "runs").exists() and not ended.done():
                    time.sleep(0.05)
                began = time.monotonic()
                time.sleep(3.0)
                log = held.read_log()
                assert log.lease is not None
                assert log.lease.nonce == held.record.nonce, "the lease of an owner that beats was taken over"
        again = ended.result()
    assert again.code == 0, again.err
    assert "showing no sign of life" in again.err or "taking over when" in again.err
    assert time.monotonic() - began < 200.0
    check(root, expected)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep the time of a start as it was")
@pytest.mark.parametrize("hours", [1, -1])
def test_owner_that_began_before_the_clock_jumped_is_alive(hours: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel keeps when a process began as seconds since boot, and the moment of the boot is now minus uptime."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        owner = lease.this_process().model_copy(
            update={"pid": process.pid, "started": birth(psutil.Process(process.pid))}
        )
        assert lease.state(owner) == "alive"
        real = psutil._pslinux.boot_time
        monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: real() + hours * HOUR)
        found = lease.state(owner)
        process.communicate(b"\n")
    assert found == "alive"


def test_newest_run_is_the_last_one_also_where_the_clock_was_set_back(
    tiny_manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed = manifests.load(tiny_manifest)
    space = workspace.Workspace.of(parsed)
    first = space.new_run().name

    class Back(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.now(tz) - timedelta(hours=1)

    monkeypatch.setattr(workspace, "datetime", Back)
    last = space.new_run().name
    assert space.runs() == [first, last]


def test_gc_whose_clock_is_ahead_takes_nothing_from_a_run_that_lives(
    expected: dict[str, str], finished: SimpleNamespace, tmp_path: Path
) -> None:
    """What a unit has written and not yet committed is referred to by nothing, and must stay."""
    root = tmp_path / "root"
    override = ("--set", f"root={root}")
    trouble = Trouble(hardship.stop, r"/root/harvest/.*/units/")
    going = hardship.begin("run", finished.manifest, *override, folder=tmp_path / "run", trouble=trouble)
    going.wait_until_stopped()
    jump = functools.partial(hardship.jump, HOUR)
    swept = hardship.command("gc", root, "--delete", "--older-than", "0.02", folder=tmp_path / "gc", before=jump)
    going.go_on()
    ended = going.wait()
    assert swept.code in (0, 75), swept.err
    assert ended.code == 0, ended.err
    check(root, expected)
