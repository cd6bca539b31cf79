"""Runs a script in the peers' environment (`make .venv-peers`), where their own code is."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.runs import PATIENCE

PYTHON = Path(__file__).resolve().parents[2] / ".venv-peers" / "bin" / "python"


def required() -> None:
    """Skip, or fail where KILOBASIS_REQUIRE_PEERS=1, if the environment is not there."""
    if not PYTHON.exists():
        reason = f"{PYTHON} is not there; make it with `make .venv-peers`"
        if os.environ.get("KILOBASIS_REQUIRE_PEERS") == "1":
            pytest.fail(reason)
        pytest.skip(reason)


def run(script: Path, *arguments: Path) -> None:
    """Run a script to its end, which must be a good one."""
    done = subprocess.run(
        [str(PYTHON), str(script), *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr[-4000:]
