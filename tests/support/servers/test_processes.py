import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.servers.processes import Processes, StartError, free_port

ROOT = Path(__file__).parents[3]

OWNER = """
import time
from tests.support.servers.processes import Processes

processes = Processes("owned")
for name in ("first", "second"):
    processes.start(name, "sleep", "600")
print(processes.folder, processes.pid("first"), processes.pid("second"), flush=True)
time.sleep(600)
"""


def runs(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def eventually(condition: Callable[[], bool], seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_processes_closed_are_gone_with_their_folder() -> None:
    processes = Processes("closed")
    processes.start("sleeper", "sleep", "600")
    pid = processes.pid("sleeper")
    assert runs(pid)
    processes.close()
    assert not runs(pid)
    assert not processes.folder.exists()
    processes.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "terminated"])
def test_processes_owner_gone_end_with_their_folder(number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER], cwd=ROOT, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        folder, *pids = owner.stdout.readline().split()
        assert Path(folder).is_dir()
        assert all(runs(int(pid)) for pid in pids)
        owner.send_signal(number)
    assert eventually(lambda: not any(runs(int(pid)) for pid in pids))
    assert eventually(lambda: not Path(folder).exists())


def test_processes_start_that_ends_at_once_shows_its_log() -> None:
    processes = Processes("failing")
    try:
        processes.start("server", "sh", "-c", "echo no such option; exit 3")
        with pytest.raises(StartError, match=r"server ended\n-- server.log\nno such option"):
            processes.wait_for(free_port())
        with pytest.raises(StartError, match="ended with code 4: bad"):
            processes.run("sh", "-c", "echo bad; exit 4")
    finally:
        processes.close()


def test_processes_environment_has_nothing_of_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "work")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    processes = Processes("clean")
    try:
        processes.run("sh", "-c", 'test -z "$AWS_PROFILE$HTTP_PROXY" && test "$HOME" = "$PWD" && test "$GIVEN" = 1',
                      environment={"GIVEN": "1"})  # fmt: skip
    finally:
        processes.close()
    assert os.environ["AWS_PROFILE"] == "work"
