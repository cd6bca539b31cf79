"""Commands of the real command line in processes of their own, for which trouble is arranged.

A full disk, no descriptor left, a clock that jumps: all of it real where it can be, and gone with the process or
with the mount. The processes are forked from the server of `dying`, which has imported everything.
"""

import atexit
import contextlib
import ctypes
import errno
import gc
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest

import cluster.storage.create as creating
import jobs.workspace
from jobs import cli
from tests.support.dying import CONTEXT


@dataclass(frozen=True)
class Trouble:
    """What befalls a process just before it creates an object.

    Attributes:
        strike: What happens. It is pickled: a function of a module, or a partial of one.
        where: What is found in the object's path, as a regular expression.
        number: The how-manieth such object, from 1.
    """

    strike: Callable[[], object]
    where: str = ""
    number: int = 1


@dataclass(frozen=True)
class Ended:
    """How a command ended. `memory` is by how many bytes it grew at its largest; `struck` whether trouble came."""

    code: int
    out: str
    err: str
    memory: int
    struck: bool

    @property
    def line(self) -> str:
        """The one line in which a command says why it failed: the last one, and the only one of its kind.

        Raises:
            AssertionError: there is none, or more than one, or a traceback.
        """
        assert "Traceback" not in self.out + self.err, self.err
        lines = self.err.splitlines()
        said = [line for line in lines if line.startswith("kilobasis: ")]
        assert len(said) == 1, self.err
        assert said == lines[-1:], self.err
        assert said[0].isprintable(), self.err
        assert " -> " in said[0], self.err
        return said[0]


@dataclass(frozen=True)
class Going:
    """A command that runs; its output goes to a folder."""

    process: BaseProcess
    folder: Path

    def wait(self, timeout: float = 90.0) -> Ended:
        """How it ended.

        Raises:
            AssertionError: it hangs.
        """
        self.process.join(timeout)
        out, err = ((self.folder / name).read_text(errors="surrogateescape") for name in ("out", "err"))
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise AssertionError(f"still running after {timeout} s: {err}")
        memory, struck = (self.folder / "facts").read_text().split() or ("0", "0")
        return Ended(self.process.exitcode, out, err, int(memory), struck == "1")

    def wait_until_stopped(self, timeout: float = 60.0) -> None:
        """Return when a signal has stopped it."""
        deadline = time.monotonic() + timeout
        while psutil.Process(self.process.pid).status() != psutil.STATUS_STOPPED:
            assert time.monotonic() < deadline, (self.folder / "err").read_text()
            time.sleep(0.01)

    def go_on(self) -> None:
        """Wake it."""
        psutil.Process(self.process.pid).send_signal(signal.SIGCONT)


def begin(
    *arguments: object,
    folder: Path,
    trouble: Trouble | None = None,
    before: Callable[[], object] | None = None,
    environment: Mapping[str, str | None] | None = None,
) -> Going:
    """Begin `kilobasis ARGUMENTS` in another process.

    Args:
        arguments: The words of the command line.
        folder: Where its output goes.
        trouble: See there.
        before: Called in the process before the command.
        environment: Variables to set, or with None to take away.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("out", "err", "facts"):
        (folder / name).write_bytes(b"")
    changed = {**os.environ, **(environment or {})}
    words = [str(word) for word in arguments]
    process = CONTEXT.Process(target=_command, args=(words, str(folder), trouble, before, changed))
    process.start()
    return Going(process, folder)


def command(*arguments: object, folder: Path, timeout: float = 90.0, **options: Any) -> Ended:
    """Run `kilobasis ARGUMENTS` in another process: see `begin`."""
    return begin(*arguments, folder=folder, **options).wait(timeout)


def _command(
    words: list[str],
    folder: str,
    trouble: Trouble | None,
    before: Callable[[], object] | None,
    environment: Mapping[str, str | None],
) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update({name: value for name, value in environment.items() if value is not None})
    facts = os.open(Path(folder) / "facts", os.O_WRONLY)
    for number, name in ((1, "out"), (2, "err")):
        stream = os.open(Path(folder) / name, os.O_WRONLY)
        os.dup2(stream, number)
        os.close(stream)
    began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    struck = _arrange(trouble) if trouble else lambda: False
    code: object = 1
    try:
        if before:
            before()
        with mock.patch.object(sys, "argv", ["kilobasis", *words]):
            cli.main()
    except SystemExit as end:
        code = end.code
    except BaseException:  # noqa: BLE001 - as the interpreter does
        traceback.print_exc()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - began
    os.write(facts, f"{grown * 1024} {int(struck())}".encode())
    # What the interpreter does in the end, and a forked process does not.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(code if isinstance(code, int) else 1)


def _arrange(trouble: Trouble) -> Callable[[], bool]:
    seen = 0
    real = creating._create_local

    def create(target: Path, body: bytes) -> bool:
        nonlocal seen
        if re.search(trouble.where, str(target)):
            seen += 1
            if seen == trouble.number:
                trouble.strike()
        return real(target, body)

    creating._create_local = create
    return lambda: seen >= trouble.number


def stop() -> None:
    """The process stops, until it is sent SIGCONT."""
    os.kill(os.getpid(), signal.SIGSTOP)


def kill() -> None:
    """The process ends, with no time to clear up."""
    os.kill(os.getpid(), signal.SIGKILL)


# Limits of a process


def take_descriptors(spare: int = 0) -> None:
    """Leave no file descriptor but `spare` ones."""
    # What is garbage by now would give its own back later.
    gc.collect()
    taken = []
    highest = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 8, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    with contextlib.suppress(OSError):
        while True:
            taken.append(os.dup(1))
    for number in taken[:spare]:
        os.close(number)


def limit_files(size: int) -> None:
    """No file can become larger than this: EFBIG, for Python ignores the signal."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def limit_memory(more: int) -> None:
    """The process may take so many bytes of addresses more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, resource.RLIM_INFINITY))


def forbid(folder: Path) -> None:
    """Nothing can be created in a folder or below it, by this process, whoever runs it."""
    for each in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        each.chmod(0o555)
    _drop_privileges()


def allow(folder: Path) -> None:
    """Undo `forbid`, for other processes."""
    for each in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        each.chmod(0o755)


def _drop_privileges() -> None:
    """Let permissions count for root, too: no capability is left."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    if ctypes.CDLL(None, use_errno=True).capset(header, (ctypes.c_uint32 * 6)()):
        raise OSError(ctypes.get_errno(), "capset")


def jump(seconds: float) -> None:
    """The clock of the wall jumps; the monotonic one goes on."""
    real, kind = time.time, jobs.workspace.datetime

    class Jumped(kind):  # type: ignore[misc, valid-type]
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return kind.fromtimestamp(time.time(), tz)

    time.time = lambda: real() + seconds
    jobs.workspace.datetime = Jumped


def jump_later(after: float, seconds: float) -> None:
    """The clock jumps so many seconds from now, whatever the process is doing then."""
    timer = threading.Timer(after, jump, [seconds])
    timer.daemon = True
    timer.start()


# Disks


def _mount(*words: object) -> None:
    subprocess.run(["mount", *map(str, words)], check=True, capture_output=True)


def make_read_only(folder: Path) -> None:
    """As when a disk has failed: what is open goes on, and nothing can be opened to write any more."""
    _mount("--bind", folder, folder)
    for _ in range(100):
        # Busy while somebody has just opened something.
        with contextlib.suppress(subprocess.CalledProcessError):
            _mount("-o", "remount,bind,ro", folder)
            return
        time.sleep(0.01)
    raise AssertionError(f"{folder} cannot be made read-only")


@dataclass(frozen=True)
class Disk:
    """A small file system in memory."""

    path: Path

    def fill(self, leave: int = 0) -> None:
        """Use up all but `leave` bytes."""
        with open(self.path / "ballast", "wb", buffering=0) as stream:
            with _until_full():
                while True:
                    stream.write(bytes(1 << 12))
            stream.truncate(max(0, stream.tell() - leave))

    def take_inodes(self, leave: int = 0) -> None:
        """Use up all but `leave` names of files."""
        names = (self.path / f"ballast-{number}" for number in range(1 << 20))
        made = []
        with _until_full():
            for name in names:
                name.touch(exist_ok=False)
                made.append(name)
        for name in made[:leave]:
            name.unlink()

    def mend(self) -> None:
        """Give back what was used up, and make it writable again."""
        while not subprocess.run(["umount", "--lazy", self.path / "root"], check=False, capture_output=True).returncode:
            pass
        for each in self.path.glob("ballast*"):
            each.unlink()


@contextlib.contextmanager
def _until_full() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise


@contextlib.contextmanager
def mounted(folder: Path, size: str = "16m", inodes: int = 4000) -> Iterator[Disk]:
    """A disk at a folder; the test is skipped where nobody may mount one."""
    folder.mkdir(parents=True)
    try:
        _mount("-t", "tmpfs", "-o", f"size={size},nr_inodes={inodes}", "kilobasis", folder)
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        pytest.skip(f"nothing can be mounted here ({error})")
    disk = Disk(folder)
    try:
        yield disk
    finally:
        disk.mend()
        subprocess.run(["umount", "--lazy", folder], check=True, capture_output=True)


fill, take_inodes = Disk.fill, Disk.take_inodes
