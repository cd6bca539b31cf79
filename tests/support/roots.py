"""Roots of finished runs: what is in them, and how they are made to look unfinished."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from cluster.storage.objects import names
from cluster.storage.path import StoragePath
from jobs.event_log import events_of, fewest
from schemas.events import Event


def newest(root: Path) -> Path:
    """The folder of the newest run."""
    return max((root / "runs").iterdir())


def events(run: Path) -> list[dict[str, Any]]:
    """What a run told."""
    folder = run / "events"
    pieces = fewest(path.name for path in folder.iterdir())
    return [json.loads(line) for piece in pieces for line in (folder / piece.name).read_text().splitlines()]


def told(root: StoragePath) -> list[Event]:
    """What all runs of a root told, one run behind the other."""
    return [event for run in names(root / "runs") for _, event in events_of(root / "runs" / run)]


def lose_a_unit(root: Path) -> None:
    """As if the harvest had been killed before its second unit was committed."""
    (folder,) = (root / "harvest").iterdir()
    (folder / "COMMITTED.json").unlink()
    (folder / "units" / "000001.json").unlink()


def lose_last_word(run: Path) -> None:
    """As if a run had been killed, or went on."""
    last = max((run / "events").glob("*.jsonl"))
    *told, word = last.read_text().splitlines(keepends=True)
    assert json.loads(word)["event"] == "RunEnded"
    last.write_text("".join(told))


def dead_process() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid
