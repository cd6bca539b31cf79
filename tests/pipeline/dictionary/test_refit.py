"""Values of a code that are fitted together, by what makes them the best."""

import pytest
import torch

from pipeline.dictionary.model import TopKDictionary
from pipeline.dictionary.refit import refit

N, D, F, K = 40, 12, 64, 6


def made(seed: int = 0, target_width: int | None = None) -> tuple[TopKDictionary, torch.Tensor, torch.Tensor]:
    """A dictionary, activations and what they are to explain."""
    generator = torch.Generator().manual_seed(seed)
    x_ND = torch.randn(N, D, generator=generator) + 1.0
    y_NE = x_ND if target_width is None else torch.randn(N, target_width, generator=generator)
    dictionary = TopKDictionary(D, F, K, target_width=target_width)
    dictionary.initialize(x_ND, seed, None, None if target_width is None else y_NE)
    return dictionary, x_ND, y_NE


@pytest.mark.parametrize("target_width", [None, 9, 4])
def test_no_other_values_of_the_same_features_explain_more(target_width: int | None) -> None:
    """The conditions of Karush, Kuhn and Tucker. Where rows are fewer than their width there are many best ones."""
    dictionary, x_ND, y_NE = made(target_width=target_width)
    z_NK, indices_NK = dictionary.encode(x_ND)
    values_NK = refit(dictionary, z_NK, indices_NK, y_NE)
    assert values_NK.min() >= 0
    assert (values_NK[z_NK <= 0] == 0).all()
    error_NE = dictionary.decode(values_NK, indices_NK) - y_NE
    slope_NK = (dictionary.W_dec.detach()[indices_NK] @ error_NE.unsqueeze(2)).squeeze(2)[z_NK > 0]
    values = values_NK[z_NK > 0]
    assert slope_NK.min() > -1e-4
    assert (slope_NK * values).abs().max() < 1e-4
    assert (values == 0).any()
    own_NE = dictionary.decode(z_NK, indices_NK) - y_NE
    assert (error_NE.norm(dim=1) <= own_NE.norm(dim=1) + 1e-5).all()
    assert error_NE.square().sum() < 0.9 * own_NE.square().sum()


def test_values_that_made_a_token_are_found_again() -> None:
    dictionary, x_ND, _ = made()
    z_NK, indices_NK = dictionary.encode(x_ND)
    true_NK = torch.rand(z_NK.shape, generator=torch.Generator().manual_seed(3)) * (z_NK > 0)
    torch.testing.assert_close(
        refit(dictionary, z_NK, indices_NK, dictionary.decode(true_NK, indices_NK)), true_NK, rtol=1e-3, atol=1e-4
    )


def test_token_for_which_nothing_fired_stays_without_values() -> None:
    dictionary, x_ND, y_NE = made()
    z_NK, indices_NK = dictionary.encode(x_ND)
    z_NK[3] = 0
    assert (refit(dictionary, z_NK, indices_NK, y_NE)[3] == 0).all()
