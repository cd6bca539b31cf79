"""The benchmarks run and report in their format. How fast anything is, is not tested: the machine is shared."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.runs import ROOT


@pytest.mark.parametrize(
    ("script", "arguments", "names"),
    [
        ("harvest.py", [], {"harvest/quickstart/ratio", "harvest/last-layer/ratio"}),
        ("commits.py", [], {"commits/quickstart/ratio"}),
        (
            "train.py",
            ["--only", "encoder-gemm"],
            {
                "d64x16/kilobasis/tokens_per_s",
                "d64x16/kilobasis/step_by_gemm",
                "d64x64/kilobasis/peak_rss",
                "d64x64/encoder-gemm/times",
            },
        ),
    ],
)
def test_benchmark_quick_run_writes_its_numbers(
    script: str, arguments: list[str], names: set[str], tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    finished = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), "--quick", "--json", str(out), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    # 1 says that a mark was missed, which a busy machine can do.
    assert finished.returncode in (0, 1), finished.stderr[-2000:]
    found = json.loads(out.read_text())
    for name in names:
        assert any(entry["name"].endswith(name) for entry in found)
    for entry in found:
        assert set(entry) == {"name", "value", "unit", "config"}
        assert entry["value"] > 0
