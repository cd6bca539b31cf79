"""Telling one process from another that got its number later, also after somebody has set the clock."""

from __future__ import annotations

from pathlib import Path

import psutil


def birth(process: psutil.Process) -> float:
    """When a process was started, by a clock that nobody sets: on Linux in ticks since boot.

    psutil gives a time of day, which it works out from what time it is now.

    Raises:
        psutil.NoSuchProcess: it is gone.
    """
    try:
        fields = Path(f"/proc/{process.pid}/stat").read_text("ascii", "replace").rpartition(")")[2].split()
        return float(fields[19])
    except (OSError, IndexError):
        return process.create_time()
