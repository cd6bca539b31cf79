"""What fires, and what moves it, for every activation: against plain definitions, on one rank and on several."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.dictionary import parallel, sharding
from pipeline.dictionary.activation import JumpReLU, kind
from pipeline.dictionary.model import TopKDictionary
from pipeline.dictionary.objective import RowObjective
from pipeline.dictionary.optimizer import RowAdam
from pipeline.dictionary.ranks import Ranks
from pipeline.dictionary.trainer import Trainer
from schemas.compute import Sharding
from schemas.training import Sparsity, Train
from tests.pipeline.dictionary.test_sharding import batch, dense
from tests.support.gangs import meeting, spawn

NAMES = ("topk", "batch_topk", "jumprelu", "relu")


def expected_batch_top_k(x_BD: torch.Tensor, W_FD: torch.Tensor, b_F: torch.Tensor, k: int) -> torch.Tensor:
    """Which features fire: the k B largest scores above zero, the first of equal ones. Shape (B, F)."""
    z_BF = dense(*sharding.positive(x_BD, W_FD, b_F, len(W_FD), Ranks())[:2], len(W_FD))
    order = z_BF.reshape(-1).sort(descending=True, stable=True).indices[: k * len(x_BD)]
    kept = torch.zeros(z_BF.numel(), dtype=torch.bool).index_fill(0, order, True).view_as(z_BF)
    return z_BF * kept


@pytest.mark.parametrize("index", range(60))
def test_batch_top_k_takes_the_largest_of_a_batch(index: int) -> None:
    x_BD, W_FD, b_F, k = batch(index)
    chosen = sharding.batch_top_k(x_BD, W_FD, b_F, k, Ranks())
    made_BF, expected_BF = dense(chosen.z_BK, chosen.indices_BK, len(W_FD)), expected_batch_top_k(x_BD, W_FD, b_F, k)
    assert torch.equal(made_BF, expected_BF)
    if (expected_BF > 0).any():
        assert float(chosen.least) == float(expected_BF[expected_BF > 0].min())
    assert (chosen.z_BK.diff(dim=1) <= 0).all(), "the largest come first"


@pytest.mark.parametrize("index", range(0, 60, 3))
@pytest.mark.parametrize("guess", [1, 7])
def test_search_for_what_is_positive_finds_all_of_it(index: int, guess: int) -> None:
    x_BD, W_FD, b_F, _ = batch(index)
    chosen = sharding.positive(x_BD, W_FD, b_F, guess, Ranks())
    exact_BF = x_BD.double() @ W_FD.double().T + b_F
    made_BF = dense(chosen.z_BK, chosen.indices_BK, len(W_FD))
    # Some of these have weights of a hundred.
    torch.testing.assert_close(made_BF.double(), exact_BF.relu(), rtol=1e-5, atol=1e-3)
    assert chosen.z_BK.shape[1] == max(1, int((made_BF > 0).sum(1).max()))


class _Step(torch.autograd.Function):
    """1 where a score exceeds its threshold; the threshold's gradient is that of a ramp as wide as `bandwidth`."""

    @staticmethod
    def forward(ctx: Any, scores_BF: torch.Tensor, threshold_F: torch.Tensor, bandwidth: float) -> torch.Tensor:
        ctx.save_for_backward(scores_BF, threshold_F)
        ctx.bandwidth = bandwidth
        return (scores_BF > threshold_F).to(scores_BF.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scores_BF, threshold_F = ctx.saved_tensors
        near_BF = (scores_BF - threshold_F).abs() < ctx.bandwidth / 2
        return None, -(gradients[0] * near_BF / ctx.bandwidth).sum(0), None


def plain_loss(
    dictionary: TopKDictionary, x_BD: torch.Tensor, y_BD: torch.Tensor, name: str, weight: float, prefixes: list[int]
) -> Any:
    """The loss as the papers write it, with every feature's score, for autograd."""
    bias_D = dictionary.b_dec if dictionary.b_in is None else dictionary.b_in.detach()
    scores_BF = (x_BD - bias_D) @ dictionary.W_enc.T + dictionary.b_enc
    tokens, width, k = len(x_BD), y_BD.shape[1], dictionary.k
    penalty = x_BD.new_zeros(())
    if name == "topk":
        kept = torch.zeros_like(scores_BF, dtype=torch.bool).scatter(1, scores_BF.topk(k, dim=1).indices, True)
        z_BF = scores_BF.relu() * kept
    elif name == "batch_topk":
        least = scores_BF.relu().reshape(-1).topk(k * tokens).values[-1]
        z_BF = scores_BF.relu() * (scores_BF >= least)
    elif name == "jumprelu":
        assert isinstance(dictionary.activation, JumpReLU)
        step_BF = _Step.apply(scores_BF, dictionary.threshold, dictionary.activation.bandwidth)  # type: ignore[no-untyped-call]
        z_BF = scores_BF * step_BF
        penalty = weight * (step_BF.sum(1).mean() / k - 1) ** 2
        # z's gradient by the threshold has the score where it jumps: that is the threshold.
        z_BF = _AtThreshold.apply(scores_BF, dictionary.threshold, dictionary.activation.bandwidth)  # type: ignore[no-untyped-call]
    else:
        z_BF = scores_BF.relu()
        penalty = weight * z_BF.sum(1).mean() / width
    losses = []
    for end in [*prefixes, dictionary.features]:
        x_hat_BD = z_BF[:, :end] @ dictionary.W_dec[:end] + dictionary.b_dec
        losses.append((x_hat_BD - y_BD).square().mean())
    return sum(losses) / len(losses) + penalty


class _AtThreshold(torch.autograd.Function):
    """JumpReLU itself (equation 11): its derivative by the threshold is -threshold / bandwidth near it."""

    @staticmethod
    def forward(ctx: Any, scores_BF: torch.Tensor, threshold_F: torch.Tensor, bandwidth: float) -> torch.Tensor:
        ctx.save_for_backward(scores_BF, threshold_F)
        ctx.bandwidth = bandwidth
        return scores_BF * (scores_BF > threshold_F)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scores_BF, threshold_F = ctx.saved_tensors
        near_BF = (scores_BF - threshold_F).abs() < ctx.bandwidth / 2
        by_threshold_F = -(gradients[0] * near_BF * threshold_F / ctx.bandwidth).sum(0)
        return gradients[0] * (scores_BF > threshold_F), by_threshold_F, None


def random_dictionary(
    name: str, width: int, features: int, k: int, seed: int, target: int | None = None
) -> TopKDictionary:
    generator = torch.Generator().manual_seed(seed)
    dictionary = TopKDictionary(width, features, kind(name, k, Sparsity(bandwidth=0.4)), target_width=target)
    for each in dictionary.parameters():
        each.data = torch.randn(each.shape, generator=generator) / width**0.5
    dictionary.W_dec.data = torch.nn.functional.normalize(dictionary.W_dec.data, dim=1)
    if dictionary.threshold is not None:
        dictionary.threshold.data = dictionary.threshold.data.abs() + 0.3
    return dictionary


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, derandomize=True, deadline=None, database=None)
@given(
    width=st.integers(2, 20),
    features=st.integers(4, 60),
    k=st.integers(1, 12),
    tokens=st.integers(1, 30),
    cuts=st.lists(st.integers(1, 59), max_size=3, unique=True),
    target=st.one_of(st.none(), st.integers(1, 20)),
    seed=st.integers(0, 10_000),
)
def test_step_follows_the_gradient_of_the_plain_loss(
    name: str, width: int, features: int, k: int, tokens: int, cuts: list[int], target: int | None, seed: int
) -> None:
    """One step of Adam with beta1 = beta2 = 0 shows the gradient's sign; the norm, and b_dec's, its size."""
    k = min(k, features)
    prefixes = sorted(cut for cut in cuts if cut < features)
    dictionary = random_dictionary(name, width, features, k, seed, target)
    x_BD = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed + 1))
    y_BD = None
    if target is not None:
        y_BD = torch.randn(tokens, target, generator=torch.Generator().manual_seed(seed + 2))
    for each in dictionary.parameters():
        each.requires_grad_(True)
    expected = plain_loss(dictionary, x_BD, x_BD if y_BD is None else y_BD, name, 0.7, prefixes)
    expected.backward()
    gradients = {at: each.grad for at, each in dictionary.named_parameters() if each.grad is not None}
    for each in dictionary.parameters():
        each.grad = None
    if dictionary.threshold is not None and name == "batch_topk":
        dictionary.threshold.requires_grad_(False)
    if dictionary.b_in is not None:
        dictionary.b_in.requires_grad_(False)
    objective = RowObjective(dictionary, 0, 0.0, Ranks(), tuple(prefixes))
    objective.sparsity = 0.7
    # So far below any gradient's square root that a step is the gradient's sign times the rate.
    adam = RowAdam(objective, 1e-3, 0.5, 0.0, row_wise=False)
    made = objective(x_BD, None, y_BD)
    made.total.backward()
    assert float(made.total.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    close = {"rtol": 1e-3, "atol": 1e-5}
    torch.testing.assert_close(dictionary.b_dec.grad, gradients["b_dec"], **close)
    if name == "jumprelu":
        assert dictionary.threshold is not None
        torch.testing.assert_close(dictionary.threshold.grad, gradients["threshold"], **close)
    before = {at: each.detach().clone() for at, each in dictionary.named_parameters()}
    adam.step()
    squares = sum(float(each.double().square().sum()) for each in gradients.values())
    assert adam.gradient_norm == pytest.approx(squares**0.5, rel=1e-3, abs=1e-7)
    for at in ("W_enc", "b_enc"):
        # The second moment's first step is corrected to the gradient's square.
        told = gradients[at].abs() > 1e-4
        moved = before[at] - dictionary.get_parameter(at).detach()
        torch.testing.assert_close(moved[told], 1e-3 * gradients[at][told].sign(), rtol=0.02, atol=2e-6)
    torch.testing.assert_close(dictionary.W_dec.norm(dim=1), torch.ones(features))


SETTINGS = Train(tokens=20_000, batch=128, learning_rate=3e-3, dead_after=2_000, aux_k=6)
# What is trained on meshes: an activation, and what else is said of its training.
TRAINED: dict[str, tuple[str, dict[str, Any]]] = {
    "topk": ("topk", {"prefixes": (24, 40)}),
    "batch_topk": ("batch_topk", {"prefixes": (24, 40)}),
    "jumprelu": ("jumprelu", {}),
    "relu": ("relu", {"sparsity": Sparsity(weight=0.3)}),
    "transcoder": ("batch_topk", {"resample": 1280, "dead_after": 127, "decay": 0.4}),
    "left_dead": ("topk", {"aux_k": 0, "dead_after": 127, "decay": 0.4}),
    "resampled": ("topk", {"resample": 1280, "aux_k": 0, "dead_after": 127, "decay": 0.4}),
}
WIDTH, FEATURES, K, TARGET = 16, 64, 4, 12


def share(seed: int) -> torch.Tensor:
    """A batch that a sparse dictionary can explain."""
    generator = torch.Generator().manual_seed(seed)
    directions_MD = torch.nn.functional.normalize(
        torch.randn(32, WIDTH, generator=torch.Generator().manual_seed(0)), dim=1
    )
    active_BM = torch.rand(SETTINGS.batch, 32, generator=generator) < 0.08
    x_BD = (active_BM * torch.rand(SETTINGS.batch, 32, generator=generator)) @ directions_MD
    return 4 * x_BD + 0.05 * torch.randn(SETTINGS.batch, WIDTH, generator=generator)


def explained(x_BD: torch.Tensor) -> torch.Tensor:
    """What a transcoder explains: no linear map of the input. Shape (B, E)."""
    map_DE = torch.randn(WIDTH, TARGET, generator=torch.Generator().manual_seed(5)) / WIDTH**0.5
    return (x_BD @ map_DE).relu()


def learn(rank: int, mesh: Sharding, steps: int, init_method: str, folder: Path) -> None:
    """One rank of a training of each kind, on batches that are the same on any mesh."""
    torch.set_num_threads(1)
    with parallel.joined(rank, mesh.ranks, mesh.features, init_method) as ranks:
        for name in TRAINED:
            torch.save(learned(name, ranks, steps), folder / f"{name}-{rank}.pt")


def learned(name: str, ranks: Ranks, steps: int) -> dict[str, torch.Tensor]:
    """A dictionary of this kind, and the curves of its training."""
    activation, options = TRAINED[name]
    settings_ = SETTINGS.model_copy(update=options)
    target = TARGET if name == "transcoder" else None
    dictionary = TopKDictionary(WIDTH, FEATURES // ranks.features, kind(activation, K), target_width=target)
    dictionary.initialize(share(999), 0, ranks, y_ND=explained(share(999)) if target else None)
    trainer = Trainer(dictionary, settings_, steps, ranks)
    size = SETTINGS.batch // ranks.data
    curves = []
    with trainer.engine:
        for index in range(steps):
            part = slice(ranks.data_rank * size, (ranks.data_rank + 1) * size)
            x_BD = share(index)[part]
            scalars = trainer.step(index, x_BD, explained(x_BD) if target else None)()
            curves.append([scalars.fvu, scalars.l0, scalars.dead])
    return {**{at: value.clone() for at, value in dictionary.state_dict().items()}, "curves": torch.tensor(curves)}


def outcomes(mesh: Sharding, folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """What ranks of a mesh learn together, by activation."""
    spawn(learn, (mesh, 40, meeting(), folder), mesh.ranks)
    made = {}
    for name in TRAINED:
        parts = [torch.load(folder / f"{name}-{rank}.pt") for rank in range(mesh.features)]
        rows = [at for at in parts[0] if at not in ("b_dec", "b_in", "curves")]
        made[name] = {**parts[0], **{at: torch.cat([part[at] for part in parts]) for at in rows}}
    return made


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """What one rank learns."""
    return outcomes(Sharding(), tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize("name", TRAINED)
def test_activation_learns(name: str, one: dict[str, dict[str, torch.Tensor]]) -> None:
    fvu, l0, _ = one[name]["curves"].unbind(1)
    assert float(fvu[-5:].mean()) < 0.8 * float(fvu[:5].mean())
    if name != "relu":
        assert float(l0[-5:].mean()) == pytest.approx(K, rel=0.3)


def test_dead_features_started_again(one: dict[str, dict[str, torch.Tensor]]) -> None:
    """Else the tests below say nothing about it."""
    assert float(one["left_dead"]["curves"][18, 2]) > 0
    assert not torch.equal(one["resampled"]["W_dec"], one["left_dead"]["W_dec"])


def test_activations_learn_the_same_on_ranks_that_share_a_batch(
    one: dict[str, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    """To the bit, but for losses of counts and sums, which ranks add up in another order."""
    halves = outcomes(Sharding(data=2), tmp_path)
    for name, expected in one.items():
        for at, value in expected.items():
            if at != "curves" and name not in ("jumprelu", "relu"):
                assert torch.equal(halves[name][at], value), (name, at)
            torch.testing.assert_close(halves[name][at], value, rtol=1e-3, atol=1e-4, msg=f"{name} {at}")


def test_activations_learn_the_same_on_a_mesh(one: dict[str, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    parts = outcomes(Sharding(features=2, data=2), tmp_path)
    for name, expected in one.items():
        for at, value in expected.items():
            torch.testing.assert_close(parts[name][at], value, rtol=2e-3, atol=5e-4, msg=f"{name} {at}")


@pytest.mark.parametrize("name", NAMES)
def test_trained_dictionary_encodes_each_token_alone(name: str) -> None:
    dictionary = random_dictionary(name, 12, 50, 4, 3)
    x_BD = torch.randn(40, 12, generator=torch.Generator().manual_seed(1))
    whole_BF = dense(*dictionary.encode(x_BD), 50)
    alone_BF = torch.cat([dense(*dictionary.encode(x_D.unsqueeze(0)), 50) for x_D in x_BD])
    assert torch.equal(whole_BF, alone_BF)
    scores_BF = (x_BD - dictionary.b_dec) @ dictionary.W_enc.T + dictionary.b_enc
    if name == "topk":
        expected_BF = scores_BF.relu() * (scores_BF >= scores_BF.topk(4, dim=1).values[:, -1:])
    else:
        threshold_F = torch.zeros(50) if dictionary.threshold is None else dictionary.threshold
        expected_BF = scores_BF * (scores_BF > threshold_F)
    assert (expected_BF > 0).any()
    torch.testing.assert_close(whole_BF, expected_BF.detach(), rtol=1e-5, atol=1e-5)
    rescaled = random_dictionary(name, 12, 50, 4, 3)
    rescaled.rescale(0.25)
    torch.testing.assert_close(dense(*rescaled.encode(4 * x_BD), 50), 4 * whole_BF, rtol=1e-4, atol=1e-4)
