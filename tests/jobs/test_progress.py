"""The live bars of a terminal, seen through a pseudo-terminal as a person would; and what is said of failures."""

import io
import json
import os
import pty
import re
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from cluster.storage.path import StoragePath
from jobs.progress import Bars, EventLog, Lines
from schemas import events
from tests.support.runs import ROOT, command


def run_in_terminal(*arguments: str) -> tuple[int, str]:
    """Exit code and everything that appeared on a terminal of 120 columns, without the escape sequences."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command(*arguments),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=ROOT,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", "LINES": "40"},
    )
    os.close(theirs)
    seen = b""
    while True:
        try:
            block = os.read(ours, 65536)
        except OSError:
            break
        if not block:
            break
        seen += block
    os.close(ours)
    return process.wait(timeout=60), re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen.decode(errors="replace"))


def test_run_in_a_terminal_shows_a_bar_for_every_stage(tiny_manifest: Path) -> None:
    code, seen = run_in_terminal("run", str(tiny_manifest))
    assert code == 0, seen[-3000:]
    last = seen[seen.rindex("tokenize") :]
    for stage in ("tokenize", "harvest", "train/tiny", "evaluate/tiny", "catalog/tiny", "export/tiny"):
        (line,) = [line for line in last.splitlines() if line.startswith(stage)]
        assert "committed in" in line
    assert re.search(r"train/tiny +\S+ 8192/8192", last)
    assert "FVU" in last


def test_run_again_in_a_terminal_says_what_was_committed_earlier(tiny_manifest: Path) -> None:
    assert run_in_terminal("run", str(tiny_manifest))[0] == 0
    code, seen = run_in_terminal("run", str(tiny_manifest))
    assert code == 0
    assert seen.count("committed earlier") == 6


def test_mistake_in_a_terminal_is_one_line(tiny_manifest: Path) -> None:
    code, seen = run_in_terminal("run", str(tiny_manifest), "--set", "compute.workers=0")
    assert code == 2
    assert len(seen.strip().splitlines()) == 1


TROUBLE = (
    events.WorkerLost("harvest", "pid 7 on 10.0.0.1: the actor's node was terminated", 3, "unit 000012"),
    events.UnitFailed("harvest", "000012", "OSError: [Errno 5] I/O [bold]error", 2, 3, "Traceback\n  line"),
    events.UnitQuarantined("harvest", "000012", "OSError: [Errno 5] I/O error (3 attempts)"),
    events.Note("harvest", "no unit ended for 60 s; in flight: 000013 for 61 s (pid 8 on 10.0.0.2)"),
)
SAID = (
    "lost a worker with unit 000012 (pid 7 on 10.0.0.1: the actor's node was terminated), replacing it, number 3",
    "unit 000012 failed (OSError: [Errno 5] I/O [bold]error), attempt 2 of 3",
    "unit 000012 is quarantined (OSError: [Errno 5] I/O error (3 attempts)); the others go on, then the stage fails",
    "no unit ended for 60 s; in flight: 000013 for 61 s (pid 8 on 10.0.0.2)",
)


@pytest.mark.parametrize("terminal", [False, True])
def test_failures_are_told_as_they_come(terminal: bool) -> None:
    screen = io.StringIO()
    console = Console(file=screen, width=200, force_terminal=terminal, color_system=None)
    reader = Bars(console) if terminal else Lines(console)
    for event in TROUBLE:
        reader(event)
    if isinstance(reader, Bars):
        reader.close()
    shown = [line.strip() for line in screen.getvalue().splitlines()]
    for text in SAID:
        assert any(line.endswith(text) and "harvest" in line for line in shown), text


def test_failures_are_kept_in_the_log_with_their_tracebacks(tmp_path: Path) -> None:
    log = EventLog(StoragePath.parse(tmp_path))
    for event in TROUBLE:
        log(event)
    log.flush()
    (segment,) = (tmp_path / "events").iterdir()
    kept = [json.loads(line) for line in segment.read_text().splitlines()]
    assert [line["event"] for line in kept] == ["WorkerLost", "UnitFailed", "UnitQuarantined", "Note"]
    assert kept[1]["traceback"] == "Traceback\n  line"
    assert (kept[0]["doing"], kept[0]["attempt"]) == ("unit 000012", 3)
