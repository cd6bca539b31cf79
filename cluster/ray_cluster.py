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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.storage.redaction import first_line
from schemas.errors import BusyError

OBJECT_STORE_BYTES = 128 * 2**20
CONNECT_SECONDS = 10.0

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


@contextmanager
def ray_session(address: str | None, cpus: int) -> Iterator[None]:
    """Ray, for as long as the context is open.

    Args:
        address: An existing cluster, or None to start one here.
        cpus: CPU slots that a local one offers.

    Raises:
        BusyError: the cluster does not answer.
    """
    _quiet()
    if address is not None:
        _require_answer(address)
        import ray

        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise _no_answer(address, first_line(str(error), 200)) from error
        try:
            yield
        finally:
            ray.shutdown()
        return
    # Ray reads these when it is imported and never again: one token for the life of this process, and
    # nothing may import ray before. The third is the only switch that keeps Ray on loopback: on Linux it
    # otherwise takes 127.0.0.1 for a slip and listens on every interface.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    _sweep()
    folder = tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=_TEMPORARY)
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
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def machines(address: str) -> list[dict[str, float]]:
    """What every living machine of a cluster offers, as Ray names it: CPU, GPU, memory in bytes.

    Raises:
        BusyError: the cluster does not answer.
    """
    with ray_session(address, 0):
        import ray

        return [node["Resources"] for node in ray.nodes() if node["Alive"]]
