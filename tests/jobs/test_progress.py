"""The live bars of a terminal, seen through a pseudo-terminal as a person would."""

import os
import pty
import re
import subprocess
from pathlib import Path

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
