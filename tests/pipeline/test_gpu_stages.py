"""Stages that run a model or a dictionary, on a GPU: the same as on the CPU, to rounding."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.activations.source import open_store
from pipeline.sources import models
from pipeline.stage import Committed
from schemas.layouts import FEATURES, METRICS
from schemas.manifest import Manifest
from tests.support.fixtures import HOOK_POINT
from tests.support.stages import Run, run_stage

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """No model of another test is on the device."""
    models.load.cache_clear()
    yield
    models.load.cache_clear()


def on_gpus(manifest: Manifest, gpus: float) -> Manifest:
    return manifest.model_copy(update={"compute": manifest.compute.model_copy(update={"gpus": gpus})})


def metrics(evaluate: Committed) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((evaluate.path / METRICS).local.read_bytes())
    return found


@needs_gpu
@pytest.mark.parametrize("gpus", [0.5, 1.0, 2.0])
def test_rows_harvested_on_a_gpu_are_those_of_the_cpu(gpus: float, tiny_run: Run, tmp_path: Path) -> None:
    made = run_stage("harvest", on_gpus(tiny_run.manifest, gpus), tmp_path / "harvest", tiny_run.stages)
    assert torch.cuda.max_memory_allocated() > 0
    ours, theirs = open_store(made), open_store(tiny_run.stages["harvest"])
    for slab in range(theirs.layout.geometry.slabs):
        found, expected = ours.slab(HOOK_POINT, slab), theirs.slab(HOOK_POINT, slab)
        assert np.array_equal(found.row_N, expected.row_N)
        torch.testing.assert_close(found.x_ND.float(), expected.x_ND.float(), rtol=2e-2, atol=2e-2)


@needs_gpu
def test_metrics_of_a_gpu_are_those_of_the_cpu(tiny_run: Run, tmp_path: Path) -> None:
    made = run_stage("evaluate", on_gpus(tiny_run.manifest, 1.0), tmp_path / "evaluate", tiny_run.stages)
    found, expected = metrics(made), metrics(tiny_run.stages["evaluate"])
    for contender in ("dictionary", "pca", "random"):
        for name, value in expected[contender].items():
            assert found[contender][name] == pytest.approx(value, rel=1e-2, abs=1e-3), (contender, name)


@needs_gpu
def test_catalog_of_a_gpu_is_that_of_the_cpu(tiny_run: Run, tmp_path: Path) -> None:
    made = run_stage("catalog", on_gpus(tiny_run.manifest, 1.0), tmp_path / "catalog", tiny_run.stages)
    found, expected = (
        pq.read_table((stage.path / FEATURES).local).to_pydict() for stage in (made, tiny_run.stages["catalog"])
    )
    # A code's last entry may be another one where two scores are equal to rounding.
    assert np.abs(np.array(found["fires"]) - np.array(expected["fires"])).sum() <= 0.01 * sum(expected["fires"])
    np.testing.assert_allclose(found["nearest_cosine"], expected["nearest_cosine"], atol=1e-4)
