"""A wish to stop that comes before anything is running."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from jobs import manifest as manifests
from jobs import runner
from schemas.errors import InterruptedRunError


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("during", ["survey", "refuse", "claim"])
def test_stop_while_a_run_looks_at_its_sources_ends_it_with_75(
    during: str, number: signal.Signals, tiny_manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = {"survey": runner, "refuse": runner.planning, "claim": runner.Workspace}[during]
    inner = getattr(owner, during)

    def stopped(*args: Any, **options: Any) -> Any:
        os.kill(os.getpid(), number)
        return inner(*args, **options)

    def nobody(*_: object) -> None:
        pytest.fail("the signal went past the run")

    monkeypatch.setattr(owner, during, stopped)
    before = signal.signal(number, nobody)
    try:
        with pytest.raises(InterruptedRunError, match=f"stopped by {number.name}") as caught:
            runner.run(manifests.load(tiny_manifest, []))
        assert signal.getsignal(number) is nobody
    finally:
        signal.signal(number, before)
    assert caught.value.exit_code == 75
    assert not list((tmp_path / "root").glob("tokenize/*/units/*"))
