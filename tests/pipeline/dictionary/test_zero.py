"""Dense Adam whose state, gradients and weights DeepSpeed shards over gangs that talk over gloo."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.dictionary.model import TopKDictionary
from pipeline.dictionary.parallel import Dense, joined
from pipeline.dictionary.ranks import Ranks
from pipeline.dictionary.shares import Share, normalize, remove_radial
from pipeline.dictionary.trainer import Trainer
from schemas.errors import NonFiniteError
from tests.pipeline.dictionary.test_ranks import BATCH, SETTINGS, STEPS, activations
from tests.support.gangs import meeting, next_meeting, spawn

# Of 24 numbers a row: two ranks share the row in the middle.
FEATURES = 125
ADAM = SETTINGS.model_copy(update={"optimizer": "adam"})
STAGES = (1, 2, 3)
EXACT = [
    *(Dense(stage) for stage in (0, *STAGES)),
    *(Dense(stage, "cpu") for stage in STAGES),
    Dense(0, accumulate=4),
    Dense(2, accumulate=2),
    Dense(3, "cpu", accumulate=4),
]
ROUNDED = [Dense(stage, bfloat16=True) for stage in (2, 3)]
Found = dict[str, Any]


def trained(ranks: Ranks, dense: Dense) -> Found:
    """What a few steps end with."""
    x_SBD = activations()
    dictionary = TopKDictionary(24, FEATURES, 4)
    dictionary.initialize(x_SBD[0], 0, ranks)
    trainer = Trainer(dictionary, ADAM, STEPS, ranks, dense)
    share = BATCH // ranks.data
    losses, norms = [], []
    with trainer.engine:
        for step, x_BD in enumerate(x_SBD):
            now = trainer.step(step, x_BD[ranks.data_rank * share : (ranks.data_rank + 1) * share])()
            losses.append(now.loss)
            norms.append(now.gradient_norm)
        return {
            **trainer.optimizer.weights(),
            **trainer.optimizer.tensors(),
            "losses": torch.tensor(losses),
            "norms": torch.tensor(norms),
            "dead": int((trainer.since_fired_F > ADAM.dead_after).sum()),
            "held": sum(state["exp_avg"].numel() for state in trainer.optimizer.state.values()),
        }


def rank(index: int, world_size: int, init_method: str, ways: Sequence[Dense], folder: Path) -> None:
    """Train in every way, one after the other."""
    torch.set_num_threads(1)
    for number, dense in enumerate(ways):
        with warnings.catch_warnings(record=True) as heard, joined(index, world_size, 1, init_method) as ranks:
            found = trained(ranks, dense) | {"heard": [str(each.message) for each in heard]}
            torch.save(found, folder / f"{number}-{index}.pt")
            init_method = next_meeting(ranks)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, Dense], list[Found]]:
    """What every rank ends with, by the number of ranks and the way."""
    made = {}
    for world_size in (1, 2):
        folder = tmp_path_factory.mktemp(str(world_size))
        ways = EXACT + ROUNDED
        spawn(rank, (world_size, meeting(), ways, folder), world_size)
        for number, dense in enumerate(ways):
            made[world_size, dense] = [torch.load(folder / f"{number}-{each}.pt") for each in range(world_size)]
    assert made[1, Dense()][0]["dead"] > 0, "nothing was dead: no auxiliary loss was tested"
    assert float(made[1, Dense()][0]["norms"].min()) > ADAM.clip, "nothing was clipped"
    return made


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("dense", EXACT, ids=str)
def test_zero_trains_the_weights_and_moments_of_stage_0_on_one_rank(
    dense: Dense, world_size: int, outcomes: dict[tuple[int, Dense], list[Found]]
) -> None:
    (expected,) = outcomes[1, Dense()]
    for found in outcomes[world_size, dense]:
        assert found.keys() == expected.keys()
        for name in expected.keys() - {"held", "dead", "heard"}:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)
        assert float((torch.linalg.vector_norm(found["W_dec"], dim=1) - 1).abs().max()) < 1e-6
        assert found["dead"] == expected["dead"]


@pytest.mark.parametrize("stage", STAGES)
def test_zero_fills_no_log_with_words_about_its_collectives(
    stage: int, outcomes: dict[tuple[int, Dense], list[Found]]
) -> None:
    for found in outcomes[2, Dense(stage)]:
        assert not [line for line in found["heard"] if "deprecated" in line]


@pytest.mark.parametrize("stage", STAGES)
def test_zero_shares_the_moments_out(stage: int, outcomes: dict[tuple[int, Dense], list[Found]]) -> None:
    (whole,) = outcomes[1, Dense()]
    for found in outcomes[2, Dense(stage)]:
        # A few zeros more, so that shares are alike.
        assert whole["held"] / 2 <= found["held"] <= whole["held"] / 2 + 16


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("dense", ROUNDED, ids=str)
def test_zero_with_weights_in_bfloat16_learns_what_float32_learns(
    dense: Dense, world_size: int, outcomes: dict[tuple[int, Dense], list[Found]]
) -> None:
    (exact,) = outcomes[1, Dense()]
    for found in outcomes[world_size, dense]:
        assert found["W_enc"].dtype == torch.float32, "what is moved is no longer rounded"
        assert not torch.equal(found["W_enc"], found["W_enc"].bfloat16().float())
        assert not torch.equal(found["losses"], exact["losses"]), "passes saw no bfloat16"
        assert float(found["losses"][-5:].mean()) == pytest.approx(float(exact["losses"][-5:].mean()), rel=0.03)


def refused(index: int, init_method: str, folder: Path) -> None:
    """One rank that has a number that is none in its share of a batch."""
    torch.set_num_threads(1)
    for stage in STAGES:
        with joined(index, 2, 1, init_method) as ranks:
            x_BD = activations()[0]
            dictionary = TopKDictionary(24, FEATURES, 4)
            dictionary.initialize(x_BD, 0, ranks)
            trainer = Trainer(dictionary, ADAM, STEPS, ranks, Dense(stage))  # type: ignore[arg-type]
            with trainer.engine:
                trainer.step(0, x_BD[index * 32 : index * 32 + 32])
                before = {name: value.clone() for name, value in trainer.optimizer.weights().items()}
                if index == 1:
                    x_BD[40] = float("nan")
                with pytest.raises(NonFiniteError, match="step 1"):
                    trainer.step(1, x_BD[index * 32 : index * 32 + 32])
                after = trainer.optimizer.weights()
                assert all(torch.equal(after[name], value) for name, value in before.items())
            init_method = next_meeting(ranks)
    (folder / str(index)).touch()


def test_zero_gradient_that_is_not_finite_stops_all_ranks_before_the_update(tmp_path: Path) -> None:
    spawn(refused, (meeting(), tmp_path), 2)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 40])
def test_shares_of_a_matrix_have_every_number_once_and_in_its_row(parts: int) -> None:
    """Also where rows are cut, where a share lies within one, and where it is beyond the end."""
    W_FD = torch.arange(1.0, 36.0).view(5, 7)
    rows: list[list[float]] = [[] for _ in W_FD]
    for index in range(parts):
        share = Share(W_FD.shape, Ranks(rank=index, data=parts), torch.device("cpu"))
        own = share.of(W_FD, torch.empty(-(-W_FD.numel() // parts)))
        for span, piece in share.rows(own):
            for row, numbers in zip(range(5)[span], piece.tolist(), strict=True):
                rows[row] += numbers
    assert rows == W_FD.tolist()


def test_rows_of_a_whole_matrix_lose_their_radial_gradient_and_become_unit_vectors() -> None:
    generator = torch.Generator().manual_seed(0)
    W_FD, grad_FD = torch.randn(6, 5, generator=generator), torch.randn(6, 5, generator=generator)
    share = Share(W_FD.shape, Ranks(), torch.device("cpu"))
    normalize(W_FD, share)
    torch.testing.assert_close(torch.linalg.vector_norm(W_FD, dim=1), torch.ones(6))
    remove_radial(grad_FD, W_FD, share)
    torch.testing.assert_close(torch.linalg.vecdot(grad_FD, W_FD), torch.zeros(6), rtol=0, atol=1e-6)
