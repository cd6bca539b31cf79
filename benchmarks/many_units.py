"""A root with very many unit records, and a mock of S3 that holds one.

    python benchmarks/many_units.py FOLDER PORT        serves a folder as the bucket `many`, until it is ended

Records and events are those that a run writes, byte for byte; only that they are made sure of is left out, which for a
hundred thousand files would take many minutes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.storage.create import create
from cluster.storage.path import StoragePath
from jobs import lease
from jobs import manifest as manifests
from jobs.event_log import EventLog
from jobs.log import SlotLog
from jobs.state import StageFolder
from jobs.workspace import PROCESS, Workspace
from schemas import steps
from schemas.events import Event, StageCommitted, StageStarted, UnitCommitted
from schemas.layouts import unit_key
from schemas.records import Outputs, Unit, UnitRecord, canonical_json

QUICKSTART = Path(__file__).resolve().parent.parent / "jobs" / "manifests" / "quickstart.yaml"
FINGERPRINT = "0" * 64
ROWS, SECONDS, MEMORY = 2**16, 2.0, 2**29
# Units that end within the five seconds of a segment: those of 64 workers that take two seconds for each.
PER_SEGMENT = 160
BUCKET = "many"
LOADED = "loaded"


def build(root: Path, units: int) -> None:
    """A root whose harvest has made nearly all of its units, and is not committed; `commit` commits it."""
    workspace = Workspace(StoragePath.parse(root), manifests.load(QUICKSTART, [f"root={root}"]))
    workspace.claim()
    run = workspace.new_run()
    create(run / PROCESS, canonical_json(lease.this_process().model_dump()) + b"\n")
    tokenized = _folder(workspace, steps.TOKENIZE)
    tokenized.claim({"inputs": {}})
    digest = tokenized.commit(Outputs(), {}, {}, SECONDS, MEMORY).record.digest
    harvested = _folder(workspace, steps.HARVEST)
    harvested.claim({"inputs": {"tokenize": digest}})
    SlotLog(harvested.path).take(lease.this_process())
    told: list[Event] = [
        StageCommitted("tokenize", SECONDS, digest, str(tokenized.path)),
        StageStarted("harvest", 0, units + 1, str(harvested.path)),
    ]
    (harvested.path / unit_key("0")).local.parent.mkdir()
    for number in range(units):
        record = _record(number)
        (harvested.path / unit_key(record.unit)).local.write_bytes(record.body())
        told.append(UnitCommitted("harvest", record.unit, ROWS, SECONDS, MEMORY))
    log = EventLog(run)
    for number, event in enumerate(told, 1):
        log(event)
        if number % PER_SEGMENT == 0:
            log.flush()
    log.flush()


def commit(root: Path, units: int) -> None:
    """Commit the harvest of what was built."""
    workspace = Workspace(StoragePath.parse(root), manifests.load(QUICKSTART, [f"root={root}"]))
    inputs = {"tokenize": _committed(_folder(workspace, steps.TOKENIZE))}
    made = {record.unit: record for record in map(_record, range(units))}
    _folder(workspace, steps.HARVEST).commit(Outputs(), made, inputs, SECONDS, MEMORY)


def _folder(workspace: Workspace, step: steps.Step) -> StageFolder:
    return StageFolder(workspace.stage_root(step, None) / FINGERPRINT[:16], step.name, FINGERPRINT)


def _committed(folder: StageFolder) -> str:
    committed = folder.committed()
    assert committed is not None
    return committed.record.digest


def _record(number: int) -> UnitRecord:
    made = Unit(objects=(), rows=ROWS, content_hash=f"{number:016x}")
    return UnitRecord(
        fingerprint=FINGERPRINT, unit=f"{number:06d}", made=made, seconds=SECONDS, peak_memory=MEMORY, nonce="0" * 32
    )


@contextmanager
def served(root: Path) -> Iterator[dict[str, str]]:
    """A mock of S3 with a folder in its bucket; yields the environment in which clients find it."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    server = subprocess.Popen([sys.executable, __file__, str(root), str(port)], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        if server.stdout.readline().strip() != LOADED:
            raise RuntimeError(f"moto did not start: exit code {server.wait(10)}")
        environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "kilobasis",
            "AWS_SECRET_ACCESS_KEY": "kilobasis",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        yield environment
    finally:
        server.kill()
        server.wait()


def serve(root: Path, port: int) -> None:
    """Serve until the parent is gone. What is served is put in without HTTP, which would take many minutes."""
    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.s3.models import s3_backends
    from moto.server import ThreadedMotoServer

    # It tells of every request.
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    bucket = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
    bucket.create_bucket(BUCKET, "us-east-1")
    for path in root.rglob("*"):
        if path.is_file():
            bucket.put_object(BUCKET, path.relative_to(root).as_posix(), path.read_bytes())
    ThreadedMotoServer("127.0.0.1", port, verbose=False).start()
    print(LOADED, flush=True)
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(0.5)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        serve(Path(sys.argv[1]), int(sys.argv[2]))
