"""Runs of a manifest that die or stop at a chosen storage operation, each in a process of its own.

The processes are forked from a server that has imported everything and has run nothing, so that one costs
what its work costs.
"""

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import deepspeed  # noqa: F401 - imported once, in the server
import transformers.models.gpt_neox.modeling_gpt_neox  # noqa: F401

import jobs.repair
import jobs.runner
from cluster.storage import create as creating
from jobs import manifest as manifests
from pipeline.stages import STAGES  # noqa: F401
from schemas.errors import KilobasisError

# Starting one looks after the others, and two threads must not both hear how a process ended.
_ONE_AT_A_TIME = threading.Lock()

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.support.dying"])

# Operations that change what lies in a store. Before a read, the store is as it was after the last of these. Heartbeats
# are left out: how many there are is a matter of time, not of what a run does.
WRITES = ("_create_local", "_create_remote", "remove")


# Where a count may begin: with the process, behind the door (the probe of the store has many operations, and nothing
# is there yet), behind the first lease.
START, DOOR, LEASE = "", "ROOT.json", "log/000000.json"
LANDMARKS = (START, DOOR, LEASE)
# Instead of a signal: the thread waits until it is told to go on, and all others go on.
HOLD = 0


@dataclass(frozen=True)
class Point:
    """The `number`-th operation from 1, just before or just after it, and what happens to the process there.

    `behind` is the landmark from which operations count.
    """

    number: int
    when: Literal["before", "after"] = "before"
    number_of_signal: int = signal.SIGKILL
    behind: str = START


@dataclass(frozen=True)
class Going:
    """A process that runs a manifest; `log` is where it says how it ended."""

    process: BaseProcess
    log: Path

    def wait(self, timeout: float = 120.0) -> int:
        """Its exit code; the signal that killed it, negative."""
        deadline = time.monotonic() + timeout
        while self.runs():
            assert time.monotonic() < deadline, f"still running after {timeout} s: {self.log.read_text()}"
            time.sleep(0.01)
        assert self.process.exitcode is not None
        return self.process.exitcode

    def runs(self) -> bool:
        """Whether it has not ended yet."""
        with _ONE_AT_A_TIME:
            return self.process.is_alive()

    def wait_until_held(self, timeout: float = 60.0) -> None:
        """Return when it has come to a point where it is held."""
        deadline = time.monotonic() + timeout
        while not _beside(self.log, "held").exists():
            assert self.runs(), self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.01)

    def go_on(self) -> None:
        """Hold it no longer."""
        _beside(self.log, "go").touch()


def _beside(log: Path, name: str) -> Path:
    return log.with_name(f"{log.name}.{name}")


def start(
    manifest: Path,
    *overrides: str,
    log: Path,
    point: Point | None = None,
    wait: bool = False,
) -> Going:
    """Begin to run a manifest in another process.

    Args:
        manifest: The YAML file.
        overrides: As after `--set`.
        log: Where it says how it ended: one line, or a traceback; and before that the number of its operations from
            each landmark on.
        point: Where it dies or stops.
        wait: Wait for other runs.
    """
    process = CONTEXT.Process(target=_run, args=(str(manifest), overrides, str(log), point, wait, dict(os.environ)))
    with _ONE_AT_A_TIME:
        process.start()
    return Going(process, log)


def _run(
    manifest: str,
    overrides: tuple[str, ...],
    log: str,
    point: Point | None,
    wait: bool,
    environment: dict[str, str],
) -> None:
    os.setsid()
    os.environ.update(environment)
    with open(log, "a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        counts = _watch(point, Path(log))
        code = 0
        try:
            done = jobs.runner.run(manifests.load(Path(manifest), list(overrides)), wait=wait)
            line = " ".join(f"{label}={committed.record.digest[:8]}" for label, committed in done.items())
        except KilobasisError as error:
            line, code = f"{type(error).__name__}: {error}", error.exit_code
        except BaseException:  # noqa: BLE001 - whatever it was, the test shall read it
            line, code = traceback.format_exc(), 1
        stream.write(f"operations {' '.join(map(str, counts.values()))}\n{line}\n")
        stream.flush()
    os._exit(code)


def _watch(point: Point | None, log: Path) -> dict[str, int]:
    """Count storage operations from each landmark on, and act at one of them."""
    counts = dict.fromkeys(LANDMARKS, 0)
    passed = {START}

    def watched(real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **options: Any) -> Any:
            for landmark in passed:
                counts[landmark] += 1
            here = point is not None and point.behind in passed and counts[point.behind] == point.number
            if here and point.when == "before":
                _strike(point, log)
            result = real(*args, **options)
            passed.update(landmark for landmark in LANDMARKS if str(args[0]).endswith(landmark))
            if here and point.when == "after":
                _strike(point, log)
            return result

        return operation

    for name in WRITES:
        wrapped = watched(getattr(creating, name))
        setattr(creating, name, wrapped)
        if name == "remove":
            # Who imported it by name has the plain one.
            jobs.repair.remove = wrapped  # type: ignore[attr-defined]
    return counts


def _strike(point: Point, log: Path) -> None:
    if point.number_of_signal != HOLD:
        os.kill(os.getpid(), point.number_of_signal)
        return
    _beside(log, "held").touch()
    while not _beside(log, "go").exists():
        time.sleep(0.01)
