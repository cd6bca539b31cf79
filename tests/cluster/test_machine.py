"""What a machine says of itself."""

import dataclasses
import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray
import torch

from cluster import machine


def test_machine_tells_what_is_installed_and_what_it_has() -> None:
    found = machine.examine(gpus=False)
    assert found.versions.ray == ray.__version__
    assert found.versions.torch.partition("+")[0] == torch.__version__.partition("+")[0]
    assert found.versions.python == ".".join(map(str, sys.version_info[:3]))
    assert 0 < found.free_memory <= found.memory <= psutil.virtual_memory().total
    assert found.scratch == tempfile.gettempdir()
    assert found.free_scratch > 0
    assert found.gpus == ()


def test_what_is_not_installed_has_no_version() -> None:
    assert machine._installed("no-such-package-anywhere") == "none"


def test_digest_is_of_all_our_modules_and_of_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, home = machine.code_digest(), Path(machine.__file__).parents[1]
    for package in machine.PACKAGES:
        shutil.copytree(home / package, tmp_path / package)
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "cluster" / "machine.py"))
    assert machine.code_digest() == ours
    (tmp_path / "pipeline" / "notes.txt").write_text("x")
    (tmp_path / "jobs" / "manifests" / "own.py").write_text("x = 1")
    assert machine.code_digest() == ours
    for path in ("pipeline/stages.py", "schemas/errors.py"):
        before = machine.code_digest()
        with open(tmp_path / path, "a") as stream:
            stream.write("# changed\n")
        assert machine.code_digest() != before
    before = machine.code_digest()
    (tmp_path / "jobs" / "more.py").write_text("")
    assert machine.code_digest() != before


@pytest.mark.parametrize(
    ("raised", "wrong"),
    [
        (None, ""),
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), ""),
        (RuntimeError("CUDA error: no kernel image is available\nfor execution"), "CUDA error: no kernel image is"),
    ],
)
def test_gpu_counts_where_torch_can_compute_on_it(
    raised: Exception | None, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ones(*_: object, **options: Any) -> torch.Tensor:
        assert options == {"device": "cuda:0"}
        if raised is not None:
            raise raised
        return torch.zeros(1)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name="H100", total_memory=80 * 2**30)
    )
    monkeypatch.setattr(torch, "ones", ones)
    (gpu,) = machine.examine(gpus=True).gpus
    assert dataclasses.replace(gpu, wrong="") == machine.Gpu("H100", 80 * 2**30, "")
    assert gpu.wrong.startswith(wrong)
    assert bool(gpu.wrong) == bool(wrong)


def test_gpus_that_ray_hides_are_looked_at_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setitem(sys.modules, "torch", torch)
    machine.examine(gpus=True)
    # Where torch is loaded already, it has looked.
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
