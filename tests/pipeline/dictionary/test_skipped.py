"""Steps that DeepSpeed passes over without a word. In float32 it never does, so a double of its engine does here."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cluster.pool import InlinePool, Rank, Resources
from pipeline.dictionary.model import TopKDictionary
from pipeline.dictionary.parallel import joined
from pipeline.dictionary.trainer import Trainer
from schemas.errors import NonFiniteError
from schemas.training import Train


class SkippingEngine:
    """DeepSpeed's engine, but that it skips some steps as it does on overflow: it counts them and updates nothing."""

    def __init__(self, inner: Any, skips: Callable[[int], bool]) -> None:
        self._inner, self._skips, self._taken = inner, skips, 0
        self.skipped_steps = 0
        self._applied = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(self, *args: Any) -> Any:
        return self._inner(*args)

    def step(self) -> None:
        self._applied = not self._skips(self._taken)
        self._taken += 1
        if self._applied:
            self._inner.step()
        else:
            self.skipped_steps += 1

    def was_step_applied(self) -> bool:
        return self._applied


def steps_taken(skips: Callable[[int], bool], steps: int = 40) -> tuple[int, NonFiniteError | None, list[int]]:
    """Train a little; how many steps went by, what stopped them, and how many had been skipped in a row at each."""
    dictionary = TopKDictionary(4, 8, 2)
    dictionary.initialize(torch.randn(64, 4, generator=torch.Generator().manual_seed(0)), 0)
    rows: list[int] = []
    stopped: list[NonFiniteError] = []

    def work(rank: Rank) -> None:
        with joined(0, 1, 1, rank.init_method) as ranks:
            train(Trainer(dictionary, Train(tokens=8 * steps, batch=8), steps, ranks))

    def train(trainer: Trainer) -> None:
        with trainer.engine:
            trainer.engine._engine = SkippingEngine(trainer.engine._engine, skips)
            for index in range(steps):
                before = dictionary.W_enc.detach().clone()
                try:
                    trainer.step(index, torch.randn(8, 4))
                except NonFiniteError as error:
                    stopped.append(error)
                    return
                assert torch.equal(before, dictionary.W_enc) == (trainer.skipped > 0)
                rows.append(trainer.skipped)

    InlinePool().gang(work, 1, Resources(), lambda event: None, "train")
    return len(rows), stopped[0] if stopped else None, rows


def test_ten_skipped_steps_in_a_row_stop_the_training_and_name_rank_and_step() -> None:
    taken, error, _ = steps_taken(lambda step: step >= 5)
    assert taken == 14
    assert error is not None
    assert error.exit_code == 5
    assert "DeepSpeed skipped 10 steps in a row, the last one step 14 on rank 0" in error.what
    assert "last good checkpoint is kept" in error.remedy


@pytest.mark.parametrize("healthy", [9, 2])
def test_skipped_steps_with_good_ones_between_them_are_passed_over(healthy: int) -> None:
    taken, error, rows = steps_taken(lambda step: step % (healthy + 1) != 0)
    assert (taken, error) == (40, None)
    assert max(rows) == healthy


def test_no_step_counts_as_skipped_when_none_is() -> None:
    assert steps_taken(lambda step: False) == (40, None, [0] * 40)
