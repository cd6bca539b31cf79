import pytest
import torch

from pipeline.dictionary import pace
from pipeline.dictionary.model import DictionaryConfig

SHAPE = DictionaryConfig(width=16, features=64, k=4, hook_point="h", model="m", model_digest="d")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds; a test moves them on."""
    now = [100.0]
    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])
    return now


def test_scalars_are_those_of_the_clock(clock: list[float]) -> None:
    made = pace.Pace(SHAPE, torch.device("cpu"), 2, 1000)
    made.wait(1.0, 3)
    clock[0] += 4
    first = made.scalars(10, 1400)
    assert first["tokens_per_second"] == 100.0
    assert first["data_wait"] == 0.25
    assert first["batches_ready"] == 3.0
    assert first["tflops"] == 100.0 * (2 * 64 * 16 + 8 * 4 * 16) / 1e12
    assert 50 * 2**20 < first["memory_bytes"] < 2**36
    assert first.keys().isdisjoint({"step_seconds", "mfu"})
    clock[0] += 5
    second = made.scalars(20, 1900)
    assert second["step_seconds"] == 0.5
    assert second["tokens_per_second"] == 100.0


def test_share_of_the_peak_counts_every_rank(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7)
    made = pace.Pace(SHAPE, torch.device("cuda", 0), 2, 0)
    clock[0] += 1
    said = made.scalars(1, 10**9)
    assert said["mfu"] == pytest.approx(10**9 * pace.flops_per_token(SHAPE) / 2 / 312e12)
    assert said["memory_bytes"] == 7
