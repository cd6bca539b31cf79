"""Ranks that decide about a step together, so that none is left alone in a collective."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.dictionary import checkpoint
from pipeline.dictionary import trainer as trainers
from pipeline.dictionary.model import TopKDictionary
from pipeline.dictionary.parallel import joined
from pipeline.dictionary.trainer import Trainer
from schemas.errors import NonFiniteError, OutrunError
from schemas.records import CheckpointRecord
from schemas.training import Train
from tests.support.gangs import meeting, spawn


def overflows(trainer: Trainer) -> None:
    """The loss of this rank's share alone is infinite; what it sends to the other one is not."""
    inner = trainer.engine._engine

    class Overflowing:
        def __getattr__(self, name: str) -> Any:
            return getattr(inner, name)

        def __call__(self, *args: Any) -> Any:
            made = inner(*args)
            return made._replace(total=made.total + float("inf"))

    trainer.engine._engine = Overflowing()


def skips(trainer: Trainer) -> None:
    """DeepSpeed passes over this rank's steps alone."""
    trainers.MOST_SKIPPED = 1
    inner = trainer.engine.step
    trainer.engine.step = lambda: inner() and False  # type: ignore[method-assign]


def step(rank: int, init_method: str, happens: Callable[[Trainer], None], folder: Path) -> None:
    """One rank of two: a step in which something happens to rank 1; leaves what came of it."""
    torch.set_num_threads(1)
    trainers.MOST_SKIPPED = 1
    dictionary = TopKDictionary(4, 8, 2)
    with joined(rank, 2, 1, init_method) as ranks:
        dictionary.initialize(torch.randn(64, 4, generator=torch.Generator().manual_seed(0)), 0, ranks)
        trainer = Trainer(dictionary, Train(tokens=64, batch=8, optimizer="adam"), 8, ranks)
        with trainer.engine:
            if rank == 1:
                happens(trainer)
            try:
                trainer.step(3, torch.randn(4, 4))
                said = "went on"
            except NonFiniteError as error:
                said = error.what
    (folder / str(rank)).write_text(said)


@pytest.mark.parametrize(
    ("happens", "own", "others"),
    [
        (overflows, "train: loss inf, gradient norm ", "not finite on another rank"),
        (skips, "train: DeepSpeed skipped 1 steps in a row", "train: DeepSpeed skipped 1 steps in a row"),
    ],
)
def test_what_one_rank_finds_in_a_step_stops_all_of_them_in_that_step(
    happens: Callable[[Trainer], None], own: str, others: str, tmp_path: Path
) -> None:
    spawn(step, (meeting(), happens, tmp_path), 2)
    assert (tmp_path / "1").read_text().startswith(own)
    assert others in (tmp_path / "0").read_text()


def test_ranks_that_found_different_checkpoints_begin_none() -> None:
    """A checkpoint of an older life of the gang may come to light between one rank's look and another's."""
    last = CheckpointRecord(slot=7, parent="", epoch=1, step=5, objects=(), facts={}, nonce="new")
    for nonces, agreed in [(["new", "new"], True), (["new", "old"], False), (["new", ""], False)]:
        ranks: Any = SimpleNamespace(texts=lambda own, nonces=nonces: [own, *nonces[1:]])
        if agreed:
            checkpoint.require_same(last, ranks, "train/x")
        else:
            with pytest.raises(OutrunError, match="train/x: ranks found different newest checkpoints"):
                checkpoint.require_same(last, ranks, "train/x")
