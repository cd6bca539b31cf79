"""The processes of one server and the folder that they live in. Both are gone when the server is closed, and when the
process that started them is, however it went: see `warden`.
"""

import contextlib
import http.client
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

# Below the range from which Linux takes ports for outgoing connections: between looking and binding, and while a
# killed server waits for its restart, none of those can take the port.
PORTS = range(20_000, 32_000)


class StartError(RuntimeError):
    """A server did not come up; the end of its logs is in the message."""


def free_port() -> int:
    """A port of 127.0.0.1 where nothing listens."""
    while True:
        port = random.SystemRandom().choice(PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def answers(port: int) -> bool:
    """Whether an HTTP server answers there, whatever it says."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=5)) as connection:
        try:
            connection.request("GET", "/")
            connection.getresponse().read()
        except (OSError, http.client.HTTPException):
            return False
        return True


class Processes:
    """Named processes in one process group and one folder.

    Args:
        name: Of the server; the folder's name shows it.
        parent: Where the folder is made.
    """

    def __init__(self, name: str, parent: Path = Path("/tmp")) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=f"kb-{name}-", dir=parent))
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        warden = [sys.executable, "-I", "-S", str(Path(__file__).with_name("warden.py"))]
        self._warden = subprocess.Popen(
            [*warden, str(os.getpid()), str(self.folder)], process_group=0, stdin=subprocess.DEVNULL
        )

    def _options(self, environment: Mapping[str, str]) -> dict[str, object]:
        # Nothing of the caller's own environment reaches a server: no proxy, no credentials, no PYTHONPATH.
        kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
        places = {"HOME": str(self.folder), "TMPDIR": str(self.folder), "LANG": "C.UTF-8"}
        return {
            "cwd": self.folder,
            "env": kept | places | dict(environment),
            "stdin": subprocess.DEVNULL,
            "stderr": subprocess.STDOUT,
            "process_group": self._warden.pid,
        }

    def run(self, *command: str | Path, environment: Mapping[str, str] = {}) -> None:
        """Run a command to its end.

        Raises:
            StartError: it failed.
        """
        done = subprocess.run(command, stdout=subprocess.PIPE, timeout=60, **self._options(environment))
        if done.returncode:
            said = done.stdout.decode(errors="replace")[-2000:]
            raise StartError(f"{command[0]} ended with code {done.returncode}: {said}")

    def start(self, name: str, *command: str | Path, environment: Mapping[str, str] = {}) -> None:
        """Start a process that stays; its output goes to `<name>.log`."""
        with open(self.folder / f"{name}.log", "ab") as log:
            self._running[name] = subprocess.Popen(command, stdout=log, **self._options(environment))

    def pid(self, name: str) -> int:
        """The process id."""
        return self._running[name].pid

    def kill(self, name: str) -> None:
        """SIGKILL, and wait until it is gone."""
        process = self._running.pop(name)
        process.kill()
        process.wait()

    def wait_for(self, port: int, seconds: float = 30) -> None:
        """Wait until an HTTP server answers.

        Raises:
            StartError: it does not within `seconds`, or one of the processes ended.
        """
        deadline = time.monotonic() + seconds
        while not answers(port):
            ended = [name for name, process in self._running.items() if process.poll() is not None]
            if ended or time.monotonic() > deadline:
                what = f"{', '.join(ended)} ended" if ended else f"nothing answers on port {port} after {seconds} s"
                raise StartError(f"{what}\n{self._logs()}")
            time.sleep(0.02)

    def _logs(self) -> str:
        logs = sorted(self.folder.glob("*.log"))
        return "\n".join(f"-- {log.name}\n{log.read_text(errors='replace')[-2000:]}" for log in logs)

    def close(self) -> None:
        """Kill every process and remove the folder."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._warden.pid, signal.SIGKILL)
        for process in (*self._running.values(), self._warden):
            process.wait()
        self._running.clear()
        shutil.rmtree(self.folder, ignore_errors=True)
