"""Machines of a Ray cluster that come and go, as operators and clouds do it."""

import subprocess
import sys


def drain(address: str, node: str, seconds: int = 60) -> None:
    """Say that a machine is being taken away, as a handler of spot notices does."""
    words = ("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot")
    limits = ("--node-id", node, "--deadline-remaining-seconds", str(seconds))
    done = subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", address, *words, *limits],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def gone(node: str) -> bool:
    """Whether a machine has left the cluster that this process has joined."""
    import ray

    return not any(each["NodeID"] == node and each["Alive"] for each in ray.nodes())
