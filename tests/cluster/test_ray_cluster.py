"""The Ray that a run starts or joins: who is let in, and how long a cluster may take to answer."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from cluster.ray_cluster import ray_session
from schemas.errors import BusyError
from tests.support.runs import ROOT

CLIENT = """
from ray._raylet import GcsClient

print("nodes", len(GcsClient({address!r}).get_all_node_info(timeout=5)))
"""
# A Ray of ours, in an environment that says what somebody else wants of his; prints what two clients came to.
SESSION = f"""
import os, subprocess, sys
from cluster.ray_cluster import ray_session

with ray_session(None, 1):
    import ray

    address = ray.get_runtime_context().gcs_address
    code = {CLIENT!r}.format(address=address)
    stranger = {{name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}}
    for who in (os.environ, stranger | {{"RAY_AUTH_MODE": "disabled"}}):
        done = subprocess.run([sys.executable, "-c", code], env=dict(who), capture_output=True, text=True, timeout=100)
        print(done.returncode, done.stdout.strip(), "AuthenticationError" in done.stderr)
"""


@pytest.mark.ray
def test_session_of_ours_asks_for_a_token_whatever_the_environment_says() -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    loose = {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SESSION], cwd=ROOT, env=kept | loose, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    owner, stranger = done.stdout.strip().splitlines()
    assert owner == "0 nodes 1 False"
    assert stranger == "1  True"


@pytest.fixture
def mute() -> Iterator[str]:
    """Somebody who takes every call and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


JOIN = """
import sys
from cluster import ray_cluster
from schemas.errors import BusyError

ray_cluster.JOIN_SECONDS = 3.0
try:
    with ray_cluster.ray_session(sys.argv[1], 1):
        pass
except BusyError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def test_cluster_that_takes_the_call_and_says_nothing_has_a_deadline(mute: str) -> None:
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", JOIN, mute], cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 75, done.stderr[-2000:]
    assert done.stdout.strip() == (
        f"compute.address {mute}: no Ray cluster answers (it took the connection, and let nobody join for 3 s) -> "
        "check the address and that the cluster runs, or leave compute.address out for a local Ray"
    )
    assert time.monotonic() - began < 30


def test_local_ray_that_does_not_come_up_is_told_of_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def slow(**_arguments: object) -> None:
        raise Exception("The current node timed out during startup. This\ncould happen because")

    monkeypatch.setattr(ray, "init", slow)
    with pytest.raises(BusyError) as raised, ray_session(None, 1):
        pass
    assert str(raised.value) == (
        "a local Ray could not be started (The current node timed out during startup. This) -> "
        "see what else takes this machine's memory and CPUs, then run it again"
    )
