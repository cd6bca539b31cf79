"""Machines in namespaces: each has an address, a name, processes, shared memory and a `/tmp/ray` of its own.

They hang on a bridge of this machine, which is the world outside. When the power of one fails nobody hears of it: its
link goes first, so that no connection is closed by those who die.
"""

import contextlib
import os
import random
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from tests.support.servers.processes import Processes

PREFIX = "kbnet"
KINDS = ("--net", "--mount", "--uts", "--ipc", "--pid")
# Set aside for tests of networks (RFC 2544), so that it is nobody's.
SUBNET = "198.18.{}."
# Debian's way to name a machine: its own name stands for an address of loopback, which is of no use to others.
HOSTS = "127.0.0.1 localhost\n127.0.1.1 {}\n"
# All that a machine is made of, in one that is gone at once.
TRIAL = """
set -e
ip link add kb type bridge
ip link add kb.0 type veth peer name kb.1
hostname trial
mount -t tmpfs tmpfs /dev/shm
"""
# The first process of a machine. A shell, because it buries the orphans that come to it.
INIT = """
set -e
hostname "$1"
mkdir -p /tmp/ray
mount -t tmpfs tmpfs /tmp/ray
mount -t tmpfs tmpfs /dev/shm
mount --bind "$2" /etc/hosts
touch "$2.ready"
while :; do sleep 3600; done
"""


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip()}"


def missing() -> str | None:
    """Why no machines can be made here, in one line; None where they can be."""
    if os.geteuid() != 0:
        return "machines in namespaces need root"
    try:
        tried = subprocess.run(
            ["unshare", *KINDS, "--fork", "sh", "-c", TRIAL], capture_output=True, text=True, timeout=30
        )
    except OSError as error:
        return f"machines in namespaces need unshare and nsenter (Debian: util-linux): {error}"
    return f"machines in namespaces cannot be made here: {tried.stderr.strip()}" if tried.returncode else None


def _remove_links(of: Callable[[int], bool]) -> None:
    """Remove the links of some owners. Those of a machine go by themselves, but not before its last connection."""
    for link in Path("/sys/class/net").glob(f"{PREFIX}*"):
        owner = re.fullmatch(rf"{PREFIX}(\d+)(\.\d+)?", link.name)
        if owner and of(int(owner[1])):
            subprocess.run(["ip", "link", "del", link.name], capture_output=True, timeout=30, check=False)


class Network:
    """A bridge and the machines on it, whose processes end with the test, however that ends. A context manager.

    Attributes:
        address: This machine's own, as the others reach it.
    """

    def __init__(self) -> None:
        # Of tests that were killed before they could.
        _remove_links(lambda owner: not psutil.pid_exists(owner))
        taken = {each.address for addresses in psutil.net_if_addrs().values() for each in addresses}
        self.subnet = random.choice(
            [made for number in range(256) if (made := SUBNET.format(number)) + "1" not in taken]
        )
        self.address = f"{self.subnet}1"
        self.bridge = f"{PREFIX}{os.getpid()}"
        self.processes = Processes("machines")
        _run("ip", "link", "add", self.bridge, "type", "bridge")
        _run("ip", "address", "add", f"{self.address}/24", "dev", self.bridge)
        _run("ip", "link", "set", self.bridge, "up")

    def logs(self) -> str:
        """The ends of what the machines' first processes and services said."""
        logs = sorted(self.processes.folder.glob("*.log"))
        return "\n".join(f"-- {log.name}\n{log.read_text(errors='replace')[-2000:]}" for log in logs)

    def close(self) -> None:
        """End the machines and remove the bridge."""
        self.processes.close()
        _remove_links(lambda owner: owner == os.getpid())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Machine:
    """One of them, as it is switched on.

    Args:
        network: Where.
        name: Its hostname.
        number: The last byte of its address.
    """

    def __init__(self, network: Network, name: str, number: int) -> None:
        self.name, self.address, self.on = name, f"{network.subnet}{number}", True
        self._owned, self._link = network.processes, f"{network.bridge}.{number}"
        self._services: list[str] = []
        hosts = network.processes.folder / f"{name}.hosts"
        hosts.write_text(HOSTS.format(name))
        ready = hosts.with_suffix(".hosts.ready")
        ready.unlink(missing_ok=True)
        self._owned.start(
            name, "unshare", *KINDS, "--fork", "--kill-child", "--mount-proc", "bash", "-c", INIT, "init", name, hosts
        )
        deadline = time.monotonic() + 30
        while not ready.exists():
            assert time.monotonic() < deadline, (network.processes.folder / f"{name}.log").read_text()
            time.sleep(0.01)
        (init,) = psutil.Process(self._owned.pid(name)).children()
        self.init, self._space = init, Path(f"/proc/{init.pid}/ns/pid").readlink()
        _run("ip", "link", "add", self._link, "type", "veth", "peer", "name", "eth0", "netns", str(init.pid))
        _run("ip", "link", "set", self._link, "master", network.bridge, "up")
        # No route leads further, or whoever asks for a name would wait for a server that is not there.
        for command in (
            "ip link set lo up",
            f"ip address add {self.address}/24 dev eth0",
            "ip link set eth0 up",
        ):
            _run(*self.inside(), *command.split())

    def inside(self) -> list[str]:
        """The command line before a command that is to run in this machine."""
        return ["nsenter", "--target", str(self.init.pid), *KINDS, "--"]

    def serve(self, name: str, command: str, environment: Mapping[str, str]) -> None:
        """Start a command, and start it again whenever it ends."""
        loop = f"cd /; while :; do {command}; sleep 1; done"
        self._services.append(f"{self.name}-{name}")
        self._owned.start(self._services[-1], *self.inside(), "bash", "-c", loop, environment=environment)

    def processes(self) -> list[psutil.Process]:
        """All that run in it."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError):
                if Path(f"/proc/{process.pid}/ns/pid").readlink() == self._space:
                    found.append(process)
        return found

    def fail(self) -> None:
        """The power is gone."""
        self.cut()
        for name in (self.name, *self._services):
            self._owned.kill(name)
        psutil.wait_procs([self.init], timeout=20)
        subprocess.run(["ip", "link", "del", self._link], capture_output=True, check=False)
        self.on = False

    def cut(self) -> None:
        """Nothing gets in or out any more."""
        _run("ip", "link", "set", self._link, "down")

    def mend(self) -> None:
        """Everything gets in and out again."""
        _run("ip", "link", "set", self._link, "up")
