"""Toy models of superposition, held to what the paper says of them."""

from typing import Any

import numpy as np
import pytest
import torch

from pipeline.synthetic.draws import Split
from pipeline.synthetic.rows import rows
from pipeline.synthetic.toy import ToySource, figure, hidden, known_directions, output, train
from schemas.synthetic import Toy
from tests.support.synthetic import dense, toy_tree


def toy_of(**changes: Any) -> Toy:
    return Toy.model_validate(toy_tree(sparsities=[0.0], train={"steps": 800, "batch": 256}, **changes))


def trained(toy: Toy) -> dict[str, torch.Tensor]:
    return train(toy, next(iter(toy.widths)))[0]


def test_linear_model_keeps_the_most_important_features_and_no_others() -> None:
    """A linear model does principal components: as many features as neurons, never superposition."""
    settings = {"steps": 3000, "batch": 256, "learning_rate": 0.01}
    tree = toy_tree(model="linear", importance=0.7, features=8, hidden=3, sparsities=[0.0], train=settings, seed=1)
    tensors = trained(Toy.model_validate(tree))
    norm_F = tensors["W_FM"].norm(dim=1)
    assert (norm_F[:3] > 0.9).all()
    assert (norm_F[3:] < 0.2).all()


def test_relu_model_represents_more_features_the_sparser_they_are() -> None:
    toy = Toy.model_validate(
        toy_tree(features=20, hidden=5, sparsities=[0.0, 0.7, 0.95], train={"steps": 1200, "batch": 512})
    )
    seen = []
    for hook_point in toy.widths:
        tensors, loss = train(toy, hook_point)
        seen.append(figure(toy, hook_point, tensors, loss))
    assert [each["sparsity"] for each in seen] == [0.0, 0.7, 0.95]
    per_dimension = [each["features_per_dimension"] for each in seen]
    assert per_dimension[0] < 1.3 < per_dimension[1] < per_dimension[2]
    assert per_dimension[2] > 2.5
    for each in seen:
        assert each["dimensions_per_feature"] == pytest.approx(1.0 / each["features_per_dimension"])


def test_absolute_value_model_computes_absolute_values() -> None:
    toy = Toy.model_validate(
        toy_tree(model="absolute_value", features=3, hidden=8, sparsities=[0.5], train={"steps": 2500, "batch": 256})
    )
    tensors = trained(toy)
    x_BF = 2 * torch.rand(2000, 3, generator=torch.Generator().manual_seed(0)) - 1
    error = (output(toy, tensors, x_BF) - x_BF.abs()).square().sum() / x_BF.square().sum()
    assert float(error) < 0.05
    # One neuron at the least is there for what is positive of a feature, and another one for what is negative.
    assert (known_directions(toy, tensors).norm(dim=1) > 0.3).all()


@pytest.mark.parametrize("model", ["linear", "relu_output", "absolute_value"])
def test_hidden_rows_of_one_feature_alone_are_its_direction(model: Any) -> None:
    toy = toy_of(model=model)
    tensors = trained(toy_of(model=model, seed=1))
    W_KM = known_directions(toy, tensors)
    for known in range(len(W_KM)):
        x_F = torch.zeros(12)
        x_F[known % 12] = 0.25 if known < 12 else -0.25
        torch.testing.assert_close(hidden(toy, tensors, x_F[None])[0], 0.25 * W_KM[known])


def test_training_twice_gives_the_same_bits_and_another_seed_others() -> None:
    first, again, other = (trained(toy_of(seed=seed)) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["W_FM"], other["W_FM"])


@pytest.mark.parametrize("model", ["relu_output", "absolute_value"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.95])
def test_rows_have_features_of_the_sparsity_and_the_hidden_layer_of_them(model: Any, sparsity: float) -> None:
    toy = Toy.model_validate(toy_tree(model=model, sparsities=[sparsity], train={"steps": 1, "batch": 8}))
    hook_point = next(iter(toy.widths))
    tensors, _ = train(toy, hook_point)
    source = ToySource(toy, hook_point, tensors)
    made = rows(source, Split.TRAIN, 0, 20_000)
    signed = model == "absolute_value"
    z_NK = dense(made.active, 24 if signed else 12)
    fires_F = (z_NK > 0).mean(0) if not signed else (z_NK > 0).mean(0)[:12] + (z_NK > 0).mean(0)[12:]
    bound = 5 * np.sqrt(max(sparsity * (1 - sparsity), 1e-9) / 20_000)
    np.testing.assert_allclose(fires_F, 1 - sparsity, atol=bound + 1e-6)
    assert made.active.value_E.mean() == pytest.approx(0.5, abs=0.01)
    x_NF = z_NK[:, :12] - z_NK[:, 12:] if signed else z_NK
    torch.testing.assert_close(made.x_ND, hidden(toy, tensors, torch.from_numpy(x_NF)))
    torch.testing.assert_close(source.plain(made.active.sliced(0, 50)).float(), made.x_ND[:50])


def test_rows_of_two_sparsities_are_different_rows() -> None:
    toy = Toy.model_validate(toy_tree(sparsities=[0.5, 0.500001], train={"steps": 1, "batch": 8}))
    made = [ToySource(toy, each, train(toy, each)[0]).block(Split.TRAIN, 0).active for each in toy.widths]
    assert made[0].value_E.tolist() != made[1].value_E.tolist()
