"""Which features are dead, and how seldom a trainer looks: on a GPU its host has to wait for the answer."""

import pytest
import torch

from cluster.pool import InlinePool, Rank, Resources
from pipeline.dictionary.model import TopKDictionary
from pipeline.dictionary.parallel import joined
from pipeline.dictionary.ranks import Ranks
from pipeline.dictionary.trainer import Trainer
from schemas.training import Train

STEPS, BATCH, PATIENCE = 12, 8, 3


@pytest.mark.parametrize("aux_k", [2, 0])
def test_trainer_looks_for_dead_features_when_one_can_have_died(aux_k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Train(tokens=STEPS * BATCH, batch=BATCH, dead_after=PATIENCE * BATCH, aux_k=aux_k)
    generator, looks, least = torch.Generator().manual_seed(0), list[float](), Ranks.least
    monkeypatch.setattr(Ranks, "least", lambda ranks, value: looks.append(value) or least(ranks, value))
    looked: list[bool] = []

    def work(rank: Rank) -> None:
        dictionary = TopKDictionary(4, 16, 2)
        dictionary.initialize(torch.randn(64, 4, generator=generator), 0)
        with torch.no_grad():
            # They never fire.
            dictionary.b_enc[:3] = -100.0
        with joined(0, 1, 1, rank.init_method) as ranks:
            train(Trainer(dictionary, settings, STEPS, ranks))

    def train(trainer: Trainer) -> None:
        given: list[torch.Tensor | None] = []
        passed = trainer._passed
        monkeypatch.setattr(trainer, "_passed", lambda x, dead, y: given.append(dead) or passed(x, dead, y))
        with trainer.engine:
            for index in range(STEPS):
                expected_F = trainer.since_fired_F > settings.dead_after
                looks.clear()
                trainer.step(index, torch.randn(BATCH, 4, generator=generator))
                # Besides, ranks agree twice a step, on 0 or 1.
                looked.append(len(looks) == 3 and looks[0] <= 0)
                assert len(looks) == 2 + looked[-1]
                if aux_k and bool(expected_F.any()):
                    assert given[-1] is not None
                    assert torch.equal(given[-1], expected_F)
                    assert expected_F[:3].all()
                else:
                    assert given[-1] is None

    InlinePool().gang(work, 1, Resources(), lambda event: None, "train")
    # Once at the start; then nobody can be dead for as many batches as it takes; then somebody is.
    looks_then = [True, *[False] * PATIENCE, *[True] * (STEPS - 1 - PATIENCE)]
    assert looked == (looks_then if aux_k else [False] * STEPS)
