"""Ends a server's processes and removes its folder when whoever started them is gone, killed with SIGKILL included.

A program of its own, `warden.py OWNER FOLDER`, which leads the process group that the server's processes join. It
waits for the owner by a pidfd: unlike the death signal of prctl, that does not depend on which thread of the owner
started a process, and unlike a pipe it cannot be held open by somebody who inherited it.
"""

import contextlib
import os
import select
import shutil
import signal
import sys
import time
from pathlib import Path


def members(group: int) -> list[int]:
    """The processes of a group that still run, without this one."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, its_group = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue  # it has just ended
        if int(its_group) == group and state not in "ZX" and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found


def main(owner: int, folder: str) -> None:
    """Wait for the owner's end, then clean up."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    try:
        watched = os.pidfd_open(owner)
    except ProcessLookupError:
        watched = None
    if watched is not None and os.getppid() == owner:
        select.select([watched], [], [])
    while left := members(os.getpgid(0)):
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
