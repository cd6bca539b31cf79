from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.sources import models
from pipeline.sources.forward import Forward
from pipeline.sources.hooks import spliced
from pipeline.sources.models import Loaded
from pipeline.sources.sequences import TokenSequence, batches, padded
from schemas.errors import StageFailedError
from schemas.manifest import Model
from tests.support.fixtures import HOOK_POINT, VOCABULARY

LENGTHS = [24, 24, 23, 22, 20, 17, 12, 9, 8, 8]


class Small(nn.Module):
    """A model on a device that has room for so many tokens."""

    def __init__(self, model: nn.Module, room: int) -> None:
        super().__init__()
        self.gpt_neox, self._whole, self._room = model.gpt_neox, model, room
        self.asked: list[int] = []

    def forward(self, input_ids: torch.Tensor, **rest: torch.Tensor) -> object:
        self.asked.append(input_ids.numel())
        if input_ids.numel() > self._room:
            raise torch.OutOfMemoryError(f"tried to allocate room for {input_ids.numel()} tokens")
        return self._whole(input_ids=input_ids, **rest)


@pytest.fixture(scope="module")
def batch() -> list[TokenSequence]:
    generator = np.random.default_rng(0)
    sequences = [
        TokenSequence(100 * index, generator.integers(0, VOCABULARY, length).astype(np.int32))
        for index, length in enumerate(LENGTHS)
    ]
    (made,) = batches(sequences, sum(LENGTHS) * 2)
    return made


@pytest.fixture(scope="module")
def loaded(tiny_model: Path) -> Loaded:
    return models.load(Model(source=str(tiny_model)))


def rows(forward: Forward, batch: Sequence[TokenSequence]) -> dict[int, torch.Tensor]:
    """What each sequence gave, by its first row."""
    with torch.inference_mode():
        return {
            sequence.first_row: seen[HOOK_POINT][index, : len(sequence)]
            for part, seen in forward(batch)
            for index, sequence in enumerate(part)
        }


@pytest.mark.parametrize("room", [24, 50, 100, 1000])
def test_batch_that_has_no_room_is_run_in_parts_and_gives_the_same(
    room: int, loaded: Loaded, batch: list[TokenSequence]
) -> None:
    whole = rows(Forward(loaded, [HOOK_POINT], HOOK_POINT), batch)
    model = Small(loaded.model, room)
    found = rows(Forward(Loaded(model, True, None), [HOOK_POINT]), batch)
    assert list(found) == [sequence.first_row for sequence in batch]
    assert max(model.asked) == len(LENGTHS) * max(LENGTHS)
    for row, x_SD in whole.items():
        torch.testing.assert_close(found[row], x_SD, rtol=1e-4, atol=1e-5)


def test_size_that_had_room_is_remembered(loaded: Loaded, batch: list[TokenSequence]) -> None:
    model = Small(loaded.model, 60)
    forward = Forward(Loaded(model, True, None), [HOOK_POINT])
    first = rows(forward, batch)
    failed = [count for count in model.asked if count > 60]
    assert failed, "there was room for everything"
    model.asked.clear()
    again = rows(forward, batch)
    assert all(count <= 60 for count in model.asked)
    assert all(torch.equal(again[row], x_SD) for row, x_SD in first.items())


def test_single_sequence_without_room_says_what_to_do(loaded: Loaded, batch: list[TokenSequence]) -> None:
    forward = Forward(Loaded(Small(loaded.model, 10), True, None), [HOOK_POINT])
    with pytest.raises(StageFailedError, match=r"one sequence of 24 tokens has no room on cpu .*corpus\.context"):
        rows(forward, batch)


def test_model_whose_layers_come_from_elsewhere_gives_the_same(
    loaded: Loaded, batch: list[TokenSequence], tiny_model: Path, tmp_path: Path
) -> None:
    """As on several devices: accelerate brings each layer where it is run; here from disk."""
    from accelerate import disk_offload
    from transformers import AutoModelForCausalLM

    whole = rows(Forward(loaded, [HOOK_POINT], HOOK_POINT), batch)
    spread = disk_offload(AutoModelForCausalLM.from_pretrained(tiny_model).eval(), str(tmp_path / "weights"))
    assert any(parameter.is_meta for parameter in spread.parameters())
    found = rows(Forward(Loaded(spread, True, None), [HOOK_POINT], HOOK_POINT), batch)
    for row, x_SD in whole.items():
        torch.testing.assert_close(found[row], x_SD)
    inputs = padded(batch)

    def doubled(model: nn.Module) -> torch.Tensor:
        with torch.inference_mode(), spliced(model, HOOK_POINT, lambda x_BSD: 2 * x_BSD):
            return torch.as_tensor(model(**inputs).logits)

    torch.testing.assert_close(doubled(spread), doubled(loaded.model))
