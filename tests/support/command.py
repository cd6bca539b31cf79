"""The `kilobasis` command in this process: as fast as a function call, with the exit code of the real one."""

import contextlib
import hashlib
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from jobs import cli


@dataclass(frozen=True)
class Result:
    """What a command left on its streams, and its exit code."""

    code: int
    out: str
    err: str


def invoke(*arguments: str | Path) -> Result:
    """Run `kilobasis ARGUMENTS`; an exception that would be a traceback passes through."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["kilobasis", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        code: object = None
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
    assert isinstance(code, int), "the command ended without an exit code"
    return Result(code, out.getvalue(), err.getvalue())


def snapshot(folder: Path) -> dict[str, str]:
    """Every file and folder below `folder`; files with the digest of their content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }
