"""A Ray cluster on machines in namespaces, and manifests that are submitted to it from outside."""

import contextlib
import json
import os
import sys
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import psutil

from tests.support.namespaces import Machine, Network

BIN = Path(sys.executable).parent
HEAD = "head"
FIRST_NUMBER = 10
# A machine that says nothing is given up after some ten seconds instead of a minute.
IMPATIENT = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
}
# What Ray calls a process of ours that has something to do.
WORKING = ["ray::Worker.run"]
DRIVER = ["-m", "jobs", "run"]
INHERITED = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM")
START_SECONDS = 180.0


class RayMachines:
    """A head and workers, each a machine whose Ray is started again whenever it ends.

    Args:
        network: Where.
        store: The variables by which clients find the object store.
        workers: How many there are, with one CPU each. The head has none to give.
        patience: Ray's settings of how long a machine may say nothing.
    """

    def __init__(self, network: Network, store: Mapping[str, str], workers: int, patience: Mapping[str, str]) -> None:
        self._network = network
        self._environment = {
            **store, **patience, **{name: os.environ[name] for name in INHERITED},
            "PATH": f"{BIN}:{os.environ['PATH']}", "RAY_USAGE_STATS_ENABLED": "0", "TMPDIR": "/tmp",
        }  # fmt: skip
        names = [HEAD, *(f"worker{number}" for number in range(1, workers + 1))]
        self._numbers = {name: FIRST_NUMBER + number for number, name in enumerate(names)}
        self.machines: dict[str, Machine] = {}
        for name in names:
            self.switch_on(name)
        self.wait_for(len(names))

    @property
    def url(self) -> str:
        """Of the dashboard."""
        return f"http://{self.machines[HEAD].address}:8265"

    def switch_on(self, name: str) -> None:
        """A new machine by this name, at the same address. Nothing of an earlier one is on it."""
        machine = self.machines[name] = Machine(self._network, name, self._numbers[name])
        port, cpus = "6379", 1
        where = f"--address {self.machines[HEAD].address}:{port}"
        if name == HEAD:
            cpus = 0
            where = f"--head --port {port} --dashboard-host {machine.address}"
        command = (
            f"ray start {where} --block --node-ip-address {machine.address} --num-cpus {cpus} "
            f"--object-store-memory {2**27} --disable-usage-stats --include-log-monitor false"
        )
        machine.serve("ray", command, self._environment)

    def wait_for(self, nodes: int) -> None:
        """Wait until so many are there."""
        deadline = time.monotonic() + START_SECONDS
        while len(self.alive()) < nodes:
            assert time.monotonic() < deadline, f"{len(self.alive())} of {nodes} nodes: {self._network.logs()}"
            time.sleep(0.2)

    def alive(self) -> set[str]:
        """The addresses of the nodes that Ray takes for alive; none where nobody can be asked."""
        token = {"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"}
        asked = urllib.request.Request(f"{self.url}/api/v0/nodes", headers=token)
        try:
            with urllib.request.urlopen(asked, timeout=5) as answer:
                nodes = json.load(answer)["data"]["result"]["result"]
        except (OSError, ValueError, KeyError, TypeError):
            return set()
        return {str(node["node_ip"]) for node in nodes if node["state"] == "ALIVE"}

    def at_work(self) -> list[Machine]:
        """Machines on which a worker of ours is in a unit, or a rank."""
        return [machine for machine in self.machines.values() if machine.on and _which(machine, slice(1), WORKING)]

    def driver(self) -> psutil.Process:
        """The process of the one job, on the head."""
        (found,) = _which(self.machines[HEAD], slice(1, 4), DRIVER)
        return found


def _which(machine: Machine, part: slice, of: list[str]) -> list[psutil.Process]:
    """Processes by a part of their command lines."""
    found = []
    for process in machine.processes():
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[part] == of:
                found.append(process)
    return found
