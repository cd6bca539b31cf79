"""Who takes part: libraries, each in a process of its own environment."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
OURS, PEERS = Path(sys.executable), ROOT / ".venv-peers" / "bin" / "python"

REFERENCE = "kilobasis"


@dataclass(frozen=True)
class Contender:
    """A library, or one way of using it: a script of `peers/`, and which of its variants."""

    name: str
    script: str
    variant: str
    python: Path = PEERS

    def command(self, setting: str) -> list[str]:
        """What starts it; `setting` is JSON."""
        return [str(self.python), str(HERE / "peers" / self.script), setting]


def environment(threads: int, device: str = "cpu") -> dict[str, str]:
    """Of a contender's process: so many threads, no accelerator unless it is one's turn, nobody is phoned."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    return (
        os.environ
        | hidden
        | {
            "OMP_NUM_THREADS": str(threads),
            "DS_ACCELERATOR": device,
            "WANDB_MODE": "disabled",
            "HF_HUB_OFFLINE": "1",
        }
    )


def missing(contenders: Iterable[Contender]) -> str | None:
    """One line where a contender's environment is not there."""
    if all(contender.python.exists() for contender in contenders):
        return None
    return f"{PEERS} is not there; make it with `make .venv-peers/ready`, or take --only {REFERENCE}"


def last_words(log: Path) -> str:
    """The line of a dead process' log that says why it died, as far as one does.

    The last one that names an error, else the last one.
    """
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line or "error:" in line]
    return ((errors or lines or ["nothing in its log"])[-1])[:200]
