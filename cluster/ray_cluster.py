"""Starts a local Ray for one run, or joins one that is there.

A Ray that we start listens on loopback only, asks for a token that nobody else knows, has no dashboard,
and lives in a short-named temporary folder (its sockets allow 107 characters) that goes with it.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster import interruption, ray_metrics
from cluster.storage.redaction import first_line
from schemas.errors import BusyError

OBJECT_STORE_BYTES = 128 * 2**20
CONNECT_SECONDS = 10.0
# For a cluster that took the connection to let us in.
JOIN_SECONDS = 60.0

# Short, because a socket's path may have 107 characters.
_TEMPORARY = Path("/tmp")  # noqa: S108
_PREFIX = "kb-ray-"


def _quiet() -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    # What Ray tells of lost workers goes to stdout, in colour, with logs of its own. Our events tell the same.
    os.environ.setdefault("RAY_DEDUP_LOGS", "1")
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "(?s).*")
    # Calls that were dropped on closing need no tracebacks.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")


def _sweep() -> None:
    """Remove the folders of runs that were killed before they could."""
    for folder in _TEMPORARY.glob(f"{_PREFIX}*-*"):
        owner = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists() and Path("/proc/self").exists():
            shutil.rmtree(folder, ignore_errors=True)


def _require_answer(address: str) -> None:
    """Knock before Ray does: it would wait for many minutes on a door that nobody opens."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise _no_answer(address, str(error)) from error


def _no_answer(address: str, why: str) -> BusyError:
    return BusyError(
        f"compute.address {address}: no Ray cluster answers ({why})",
        "check the address and that the cluster runs, or leave compute.address out for a local Ray",
    )


def _join(address: str) -> None:
    """Join a cluster, or give up: Ray by itself asks one that says nothing again and again, for minutes.

    In a thread, because a wait in there hears neither a deadline nor a wish to stop. Where it is given up, the thread
    stays behind, and the process is expected to end.
    """
    import ray

    failed: list[BaseException] = []

    def init() -> None:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except BaseException as error:  # noqa: BLE001 - raised by whoever waits for it
            failed.append(error)

    thread = threading.Thread(target=init, name="joining Ray", daemon=True)
    thread.start()
    deadline = time.monotonic() + JOIN_SECONDS
    while thread.is_alive():
        interruption.check()
        thread.join(0.1)
        if time.monotonic() > deadline and thread.is_alive():
            raise _no_answer(address, f"it took the connection, and let nobody join for {JOIN_SECONDS:.0f} s")
    if failed:
        if isinstance(failed[0], Exception):
            raise _no_answer(address, first_line(str(failed[0]), 200)) from failed[0]
        raise failed[0]


def _lock() -> None:
    """Nobody gets into a Ray of ours, whatever the environment says: that is about somebody else's.

    Ray reads these when it is imported and never again: one token for the life of this process, and nothing may
    import ray before. The last is the only switch that keeps Ray on loopback: on Linux it otherwise takes 127.0.0.1
    for a slip and listens on every interface.
    """
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32)
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"


def _require_lock() -> None:
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    if not is_token_auth_enabled():
        raise RuntimeError(
            "ray was imported before a token could be asked for, so anybody could use the Ray that is started here -> "
            "import ray later, or set RAY_AUTH_MODE=token before that"
        )


def _start(cpus: int, folder: str) -> None:
    import ray

    try:
        ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _node_ip_address="127.0.0.1",
            _temp_dir=folder,
        )
    except Exception as error:
        # Ray says by a bare Exception that its own processes took too long.
        raise BusyError(
            f"a local Ray could not be started ({first_line(str(error), 200)})",
            "see what else takes this machine's memory and CPUs, then run it again",
        ) from error


def _end() -> None:
    import ray

    with ray_metrics.ending:
        ray.shutdown()


@contextmanager
def ray_session(address: str | None, cpus: int) -> Iterator[None]:
    """Ray, for as long as the context is open.

    Args:
        address: An existing cluster, or None to start one here.
        cpus: CPU slots that a local one offers.

    Raises:
        BusyError: the cluster does not answer, or none can be started here.
    """
    _quiet()
    if address is not None:
        _require_answer(address)

        _join(address)
        try:
            yield
        finally:
            _end()
        return
    _lock()

    _require_lock()
    _sweep()
    folder = tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=_TEMPORARY)
    try:
        _start(cpus, folder)
        yield
    finally:
        _end()
        shutil.rmtree(folder, ignore_errors=True)


def machines(address: str) -> list[dict[str, float]]:
    """What every living machine of a cluster offers, as Ray names it: CPU, GPU, memory in bytes.

    Raises:
        BusyError: the cluster does not answer.
    """
    with ray_session(address, 0):
        import ray

        return [node["Resources"] for node in ray.nodes() if node["Alive"]]
