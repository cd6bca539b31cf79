"""Running manifests from tests: in this process, or as the command that a user types, and killing that."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from jobs import manifest as manifests
from jobs.runner import run

ROOT = Path(__file__).parents[2]
# Seconds that a process of a test may take: it hangs, or is on a machine that works for others as well, where a run of
# two minutes was seen to take more than five. Below pytest's own bound, so that the log is shown.
PATIENCE = 800.0


def run_inline(manifest: Path, *overrides: str) -> dict[str, str]:
    """Run in this process; digests by stage."""
    done = run(manifests.load(manifest, list(overrides)))
    return {label: committed.record.digest for label, committed in done.items()}


def command(*arguments: str) -> list[str]:
    """The command line of `kilobasis ...`, by the interpreter that runs the tests."""
    return [sys.executable, "-c", "from jobs.cli import main; main()", *arguments]


def start(*arguments: str, log: Path) -> subprocess.Popen[bytes]:
    """Start a command in a session of its own, so that its whole tree can be killed."""
    with open(log, "ab") as stream:
        return subprocess.Popen(
            command(*arguments), stdout=stream, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True
        )


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a process and everything that it started."""
    try:
        parent = psutil.Process(process.pid)
        tree = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        tree = []
    for member in tree:
        try:
            member.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    process.wait()
    psutil.wait_procs(tree, timeout=20)


def titles(processes: list[psutil.Process]) -> set[str]:
    """What those that are still there call themselves."""
    found = set()
    for process in processes:
        try:
            found |= set(process.cmdline()[:1])
        except psutil.NoSuchProcess:
            continue
    return found


def digests(root: Path) -> dict[str, str]:
    """Digest of every committed stage below a root, computed from the records."""
    from schemas.records import StageRecord, parse_record

    found = {}
    for path in sorted(root.rglob("COMMITTED.json")):
        record = parse_record(StageRecord, path.read_bytes(), "here")
        assert record.stage not in found, f"{record.stage} was committed twice"
        found[record.stage] = record.digest
    return found


def contents(root: Path) -> dict[str, str]:
    """sha256 of every object that a record below a root names, read from disk: what is really there."""
    import hashlib

    found = {}
    for path in sorted(root.rglob("*.json")):
        stage = path.parent if path.name == "COMMITTED.json" else path.parent.parent
        if path.name != "COMMITTED.json" and path.parent.name != "units":
            continue
        record = json.loads(path.read_bytes())
        for entry in record.get("outputs", record.get("made"))["objects"]:
            body = (stage / entry["key"]).read_bytes()
            found[str((stage / entry["key"]).relative_to(root))] = hashlib.sha256(body).hexdigest()
            assert found[str((stage / entry["key"]).relative_to(root))] == entry["sha256"]
    return found


def unfinished_units(root: Path) -> set[str]:
    """Harvest units of which something was written, but no record: what a resume has to do again."""
    found = set()
    for stage in (root / "harvest").glob("*"):
        written = {f"{int(path.name):06d}" for path in (stage / "activations.zarr" / "row" / "c").glob("[0-9]*")}
        found |= written - {path.stem for path in (stage / "units").glob("*.json")}
    return found
