import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.dictionary import loss
from pipeline.dictionary.model import TopKDictionary


def reference_loss(dictionary: TopKDictionary, x_BD: torch.Tensor, dead_F: torch.Tensor, aux_k: int) -> torch.Tensor:
    """The same loss written densely, for autograd to differentiate."""
    pre_BF = (x_BD - dictionary.b_dec) @ dictionary.W_enc.T + dictionary.b_enc

    def code(scores_BF: torch.Tensor, k: int) -> torch.Tensor:
        values, indices = scores_BF.topk(k, dim=1)
        return torch.zeros_like(scores_BF).scatter(1, indices, values.relu())

    x_hat_BD = code(pre_BF, dictionary.k) @ dictionary.W_dec + dictionary.b_dec
    total = (x_hat_BD - x_BD).square().mean()
    if dead_F.any() and aux_k:
        count = min(aux_k, int(dead_F.sum()))
        hidden = pre_BF.masked_fill(~dead_F, float("-inf"))
        values, indices = hidden.topk(count, dim=1)
        aux_BF = torch.zeros_like(pre_BF).scatter(1, indices, values.relu())
        error_BD = (x_BD - x_hat_BD).detach()
        total = total + 0.25 * ((aux_BF @ dictionary.W_dec - error_BD).square().mean() / error_BD.square().mean())
    return total


def make(width: int, features: int, k: int, seed: int) -> TopKDictionary:
    generator = torch.Generator().manual_seed(seed)
    dictionary = TopKDictionary(width, features, k)
    for parameter in dictionary.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / width**0.5
    return dictionary


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(
    width=st.integers(1, 24),
    features=st.integers(1, 80),
    k=st.integers(1, 80),
    batch=st.integers(1, 40),
    aux_k=st.integers(0, 12),
    seed=st.integers(0, 10_000),
)
def test_gradients_of_the_sparse_step_equal_dense_autograd(
    width: int, features: int, k: int, batch: int, aux_k: int, seed: int
) -> None:
    dictionary = make(width, features, min(k, features), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    x_BD = torch.randn(batch, width, generator=generator)
    dead_F = torch.rand(features, generator=generator) < 0.3
    has_dead = bool(dead_F.any()) and aux_k > 0

    code = dictionary(x_BD, dead_F if has_dead else None, aux_k)
    made = loss.reconstruction(x_BD, code.x_hat_BD) + 0.25 * loss.auxiliary(x_BD, code)
    made.backward()
    exact = copy.deepcopy(dictionary).double()
    exact.zero_grad()
    expected = reference_loss(exact, x_BD.double(), dead_F, aux_k)
    expected.backward()

    assert float(made.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    largest = max(float(parameter.grad.abs().max()) for parameter in exact.parameters())
    for name, parameter in exact.named_parameters():
        gradient = dictionary.get_parameter(name).grad.double()
        torch.testing.assert_close(gradient, parameter.grad, rtol=0, atol=1e-5 * largest)


def test_auxiliary_loss_reaches_the_encoder_by_finite_differences() -> None:
    dictionary = make(6, 20, 2, 3).double()
    x_BD = torch.randn(9, 6, generator=torch.Generator().manual_seed(5)).double()
    dead_F = torch.arange(20) >= 12
    feature = 15

    base = dictionary(x_BD, dead_F, 4)
    loss.auxiliary(x_BD, base).backward()
    # The residual is a target: it stays what it is while the encoder moves.
    error_BD = (x_BD - base.x_hat_BD).detach()

    def auxiliary_alone() -> torch.Tensor:
        error_hat_BD = dictionary(x_BD, dead_F, 4).error_hat_BD
        return (error_hat_BD - error_BD).square().mean() / error_BD.square().mean()

    gradient = dictionary.W_enc.grad[feature].clone()
    assert gradient.abs().max() > 0
    for channel in range(6):
        difference = 0.0
        for sign in (1.0, -1.0):
            with torch.no_grad():
                dictionary.W_enc[feature, channel] += sign * 1e-6
                difference += sign * float(auxiliary_alone())
                dictionary.W_enc[feature, channel] -= sign * 1e-6
        assert abs(difference / 2e-6 - float(gradient[channel])) < 1e-6
