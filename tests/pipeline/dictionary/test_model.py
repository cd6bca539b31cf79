import pytest
import torch

from pipeline.dictionary.model import DictionaryConfig, TopKDictionary
from pipeline.dictionary.optimizer import SphereAdam, peak_rate, rate
from pipeline.dictionary.stored import files, from_files
from schemas.errors import IntegrityError
from schemas.training import Train


def data(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(4 * width, width, generator=generator)
    weights = torch.rand(rows, 4 * width, generator=generator) * (
        torch.rand(rows, 4 * width, generator=generator) < 0.1
    )
    return weights @ directions + 3.0


def test_rescale_gives_the_dictionary_of_raw_activations() -> None:
    x_ND = data(200, 12)
    dictionary = TopKDictionary(12, 48, 5)
    dictionary.initialize(x_ND * 0.37, 1)
    dictionary.b_enc.data.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(2))
    z_NK, indices_NK = dictionary.encode(x_ND * 0.37)
    x_hat_ND = dictionary.decode(z_NK, indices_NK) / 0.37
    dictionary.rescale(0.37)
    raw_NK, same_NK = dictionary.encode(x_ND)
    assert torch.equal(indices_NK.sort(1).values, same_NK.sort(1).values)
    torch.testing.assert_close(raw_NK.sort(1).values, z_NK.sort(1).values / 0.37, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dictionary.decode(raw_NK, same_NK), x_hat_ND, rtol=1e-4, atol=1e-4)


def test_initialize_takes_the_scale_with_the_least_error() -> None:
    x_ND = data(500, 16)
    dictionary = TopKDictionary(16, 128, 6)
    dictionary.initialize(x_ND, 0)
    assert torch.allclose(dictionary.W_dec.norm(dim=1), torch.ones(128), atol=1e-5)

    def error(factor: float) -> float:
        z_NK, indices_NK = dictionary.encode(x_ND)
        return float((dictionary.decode(z_NK * factor, indices_NK) - x_ND).square().sum())

    assert error(1.0) <= min(error(0.9), error(1.1))


def test_training_steps_keep_decoder_rows_on_the_unit_sphere_and_lower_the_loss() -> None:
    x_ND = data(512, 16)
    x_ND = (x_ND - x_ND.mean(0)) / x_ND.std()
    dictionary = TopKDictionary(16, 64, 4)
    dictionary.initialize(x_ND, 0)
    optimizer = SphereAdam(dictionary, 3e-3, (0.9, 0.999))
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        main = (dictionary(x_ND).x_hat_BD - x_ND).square().mean()
        main.backward()
        optimizer.step()
        losses.append(main.item())
    assert torch.allclose(dictionary.W_dec.norm(dim=1), torch.ones(64), atol=1e-5)
    assert losses[-1] < 0.6 * losses[0]


def test_sphere_adam_ignores_the_radial_part_of_the_gradient() -> None:
    updated = []
    for radial in (0.0, 5.0):
        dictionary = TopKDictionary(4, 3, 1)
        dictionary.W_dec.data = torch.eye(3, 4)
        optimizer = SphereAdam(dictionary, 0.1, (0.9, 0.999))
        for parameter in dictionary.parameters():
            parameter.grad = torch.ones_like(parameter)
        dictionary.W_dec.grad += radial * dictionary.W_dec.data
        optimizer.step()
        updated.append(dictionary.W_dec.data.clone())
    torch.testing.assert_close(updated[0], updated[1])


def test_rate_rises_holds_and_falls() -> None:
    rates = [rate(step, 100, 2.0, 0.1, 0.25) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9:75] == [2.0] * 66
    assert rates[-1] == pytest.approx(2.0 / 25)
    assert rates == sorted(rates[:10]) + rates[10:75] + sorted(rates[75:], reverse=True)


@pytest.mark.parametrize(
    ("batch", "width", "features", "k", "subtree", "expected"),
    [
        (2**12, 256, 2**13, 32, 1, 3.6e-3),
        (2**12, 256, 2**15, 32, 1, 1.8e-3),
        (2**12, 256, 2**13, 8, 1, 1.8e-3),
        (2**10, 256, 2**13, 32, 1, 1.8e-3),
        (2**12, 4096, 2**13, 32, 1, 1.8e-3),
        (2**12, 256, 2**13, 32, 16, 7.2e-3),
    ],
)
def test_peak_rate_is_of_the_rows_that_a_feature_sees(
    batch: int, width: int, features: int, k: int, subtree: int, expected: float
) -> None:
    settings = Train(tokens=2**20, batch=batch)
    assert peak_rate(settings, width, features, k, subtree) == pytest.approx(expected)


def test_peak_rate_is_half_as_large_without_first_moments() -> None:
    settings = Train(tokens=2**20, batch=2**12, beta1=0.0)
    assert peak_rate(settings, 256, 2**13, 32) == pytest.approx(1.8e-3)


def test_peak_rate_is_the_one_given() -> None:
    assert peak_rate(Train(tokens=1000, batch=10, learning_rate=0.5, beta1=0.0), 256, 2**16, 32) == 0.5
    assert peak_rate(Train(tokens=1000, batch=10, learning_rate=0.5), 256, 2**16, 32, 16) == 0.5


def test_saved_dictionary_reads_back_bit_for_bit() -> None:
    dictionary = TopKDictionary(8, 24, 3)
    dictionary.initialize(data(64, 8), 0)
    config = DictionaryConfig(width=8, features=24, k=3, hook_point="h", model="m", model_digest="d")
    saved = from_files(dict(files(dictionary)).values(), config.model_dump_json().encode())
    assert saved.config == config
    for name, value in dictionary.state_dict().items():
        assert torch.equal(saved.dictionary.state_dict()[name], value)


def test_saved_dictionary_of_another_shape_is_refused() -> None:
    dictionary = TopKDictionary(8, 24, 3)
    for features in (23, 25):
        config = DictionaryConfig(width=8, features=features, k=3, hook_point="h", model="m", model_digest="d")
        with pytest.raises(IntegrityError, match=f"its files have 24 features, its description {features}"):
            from_files(dict(files(dictionary)).values(), config.model_dump_json().encode())
