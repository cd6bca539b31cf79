"""A manifest as a job of a real Ray: by our `submit`, and by Ray's own as its documentation has it."""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.fixtures import manifest_tree, write_manifest
from tests.support.runs import ROOT, run_inline

BIN = Path(sys.executable).parent
TOKEN = "1" * 64


def environment() -> dict[str, str]:
    return {
        **os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN,
        "RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }  # fmt: skip


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as door:
        return int(door.getsockname()[1])


@pytest.fixture(scope="module")
def dashboard() -> Iterator[str]:
    """Of a Ray that is nobody else's: its address."""
    port = free_port()
    # Sockets' paths may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="rj", dir="/tmp", ignore_cleanup_errors=True) as folder:
        head = subprocess.Popen(
            [
                *(BIN / "ray", "start", "--head", "--block", "--port", "0", "--node-ip-address", "127.0.0.1"),
                *("--dashboard-host", "127.0.0.1", "--dashboard-port", str(port), "--num-cpus", "4"),
                # Jobs are started by the agent. Where its usual port is taken, by another Ray's, it starts none.
                *("--dashboard-agent-listen-port", str(free_port())),
                *("--object-store-memory", str(2**27), "--temp-dir", folder, "--disable-usage-stats"),
            ],
            env=environment(), start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            wait_for(f"http://127.0.0.1:{port}/api/version", head)
            yield f"http://127.0.0.1:{port}"
        finally:
            head.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                head.wait(30)
            # Its daemons are sessions of their own; they all know the folder.
            for process in psutil.process_iter(["cmdline"]):
                if any(folder in part for part in process.info["cmdline"] or ()):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
            head.wait(30)


def wait_for(url: str, head: subprocess.Popen[bytes]) -> None:
    asked = urllib.request.Request(url, headers={"Authorization": f"Bearer {TOKEN}"})
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert head.poll() is None, "ray start ended"
        with contextlib.suppress(OSError), urllib.request.urlopen(asked, timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(0.5)
    raise AssertionError(f"{url} did not answer")


def command(*arguments: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(each) for each in arguments], cwd=folder, env=environment(), capture_output=True, text=True, timeout=800
    )


@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_jobs_of_a_real_ray_make_what_a_run_here_makes(
    dashboard: str, tiny_model: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    tree = manifest_tree(tiny_model, tiny_corpus, tmp_path / "root")
    del tree["compute"]["pool"]
    manifest = write_manifest(tmp_path / "tiny.yaml", tree)
    submit = (BIN / "kilobasis", "submit", manifest, "--address", dashboard)

    done = command(*submit, folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "export/tiny" in done.stdout
    assert "everything is committed" in done.stdout

    again = command(*submit, folder=tmp_path)
    assert (again.returncode, "is there already (succeeded)" in again.stdout) == (0, True)
    jobs = command(BIN / "kilobasis", "list", "--address", dashboard, folder=tmp_path).stdout
    assert jobs.count("kilobasis-tiny-") == 1

    # As Ray's documentation submits: from the folder that has the code, into a root of its own.
    whole = command(
        *(BIN / "ray", "job", "submit", "--address", dashboard, "--", BIN / "kilobasis", "run", manifest),
        *("--set", f"root={tmp_path / 'other'}", "--set", "compute.address=auto"),
        folder=ROOT,
    )
    assert whole.returncode == 0, whole.stdout[-4000:] + whole.stderr[-2000:]
    digests = [
        run_inline(manifest, f"root={tmp_path / root}", "compute.pool=inline") for root in ("root", "other", "x")
    ]
    assert digests[0] == digests[1] == digests[2]
