"""The SAELens export, proven by the real SAELens: it loads the folder, and computes the same numbers.

Shapes and names prove little: a transposed decoder of a square dictionary, or a bias that is subtracted
twice, loads well. SAELens lives in an environment of its own (`make .venv-peers`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.numpy
import torch

from pipeline.dictionary.activation import Activation, BatchTopK, JumpReLU, ReLU, TopK, kind
from pipeline.dictionary.model import DictionaryConfig, TopKDictionary
from pipeline.export import SAELENS_VERSION, ExportParams, saelens_files
from tests.interop import peers

PROBE = Path(__file__).with_name("saelens_probe.py")
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Seen:
    """What SAELens made of a folder, beside what we make of the same dictionary."""

    x_BD: torch.Tensor
    dictionary: TopKDictionary
    features_BF: npt.NDArray[np.float32]
    reconstruction_BD: npt.NDArray[np.float32]
    facts: dict[str, Any]
    folder: Path


def dictionary_of(
    width: int, features: int, activation: Activation, seed: int, target_width: int | None
) -> TopKDictionary:
    """A dictionary in which every tensor counts: untied, biased, and rectified now and then."""
    generator = torch.Generator().manual_seed(seed)
    dictionary = TopKDictionary(width, features, activation, target_width=target_width)
    with torch.no_grad():
        for parameter in dictionary.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        dictionary.W_dec.copy_(torch.nn.functional.normalize(dictionary.W_dec, dim=1))
        if target_width is None:
            dictionary.W_enc.copy_(0.5 * dictionary.W_dec + 0.05 * dictionary.W_enc)
        # So low that some of the k largest pre-activations are negative.
        dictionary.b_enc.sub_(2.0)
        if dictionary.threshold is not None:
            dictionary.threshold.abs_()
    return dictionary


# D, F, activation, width of the target. Square as well: there a transposed matrix has the right shape.
CASES: dict[str, tuple[int, int, str, int | None]] = {
    "overcomplete": (24, 96, "topk", None),
    "square": (32, 32, "topk", None),
    "batch_topk": (24, 96, "batch_topk", None),
    "jumprelu": (24, 96, "jumprelu", None),
    "relu": (24, 96, "relu", None),
    "jumprelu_transcoder": (24, 96, "batch_topk", 20),
    "relu_transcoder": (24, 96, "relu", 24),
}


def export(folder: Path, width: int, features: int, activation: str, target_width: int | None) -> TopKDictionary:
    """The dictionary that is written into the folder."""
    dictionary = dictionary_of(width, features, kind(activation, 8), width, target_width)
    config = DictionaryConfig(
        width=width,
        features=features,
        activation=activation,
        k=8,
        hook_point="layers.2.mlp:in",
        target="layers.2.mlp" if target_width else None,
        target_width=target_width,
        model="tiny",
        model_digest="0",
    )
    density_F = np.linspace(0.0, 0.5, features)
    settings = ExportParams(formats=("saelens",), context=64, has_bos=True, model_class="AutoModelForCausalLM")
    for name, body in saelens_files(dictionary, config, density_F, settings).items():
        (folder / name).write_bytes(body)
    return dictionary


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Seen]:
    """An export of each case, loaded and used by SAELens: by one process, which takes long to start."""
    peers.required()
    made, asked = {}, []
    for name, case in CASES.items():
        folder, out = tmp_path_factory.mktemp("export"), tmp_path_factory.mktemp("out")
        dictionary = export(folder, *case)
        x_BD = 2.0 * torch.randn((256, case[0]), generator=torch.Generator().manual_seed(1)) + 0.5
        np.save(out / "x.npy", x_BD.numpy())
        made[name] = dictionary, x_BD, folder, out
        asked += [folder, out]
    peers.run(PROBE, *asked)
    return {
        name: Seen(
            x_BD=x_BD,
            dictionary=dictionary,
            features_BF=np.load(out / "features.npy"),
            reconstruction_BD=np.load(out / "reconstruction.npy"),
            facts=json.loads((out / "facts.json").read_text()),
            folder=folder,
        )
        for name, (dictionary, x_BD, folder, out) in made.items()
    }


@pytest.fixture(params=CASES)
def seen(request: pytest.FixtureRequest, every: dict[str, Seen]) -> Seen:
    """Each of them."""
    return every[request.param]


def test_saelens_encoding_an_export_gives_our_features(seen: Seen) -> None:
    z_BK, indices_BK = seen.dictionary.encode(seen.x_BD)
    # What does not fire may name any feature.
    features = seen.dictionary.features
    places_BK = indices_BK.where(z_BK > 0, features)
    ours_BF = torch.zeros(len(seen.x_BD), features + 1).scatter_(1, places_BK, z_BK)[:, :features].numpy()
    most = seen.dictionary.k if isinstance(seen.dictionary.activation, TopK) else seen.dictionary.features
    assert 0 < (ours_BF > 0).sum() < ours_BF.shape[0] * most
    np.testing.assert_allclose(seen.features_BF, ours_BF, rtol=TOLERANCE, atol=TOLERANCE)


def test_saelens_decoding_an_export_gives_our_reconstruction(seen: Seen) -> None:
    ours_BD = seen.dictionary.decode(*seen.dictionary.encode(seen.x_BD)).numpy()
    np.testing.assert_allclose(seen.reconstruction_BD, ours_BD, rtol=TOLERANCE, atol=TOLERANCE)


def test_saelens_loading_an_export_keeps_what_the_config_says(seen: Seen) -> None:
    assert seen.facts["version"] == SAELENS_VERSION
    classes = {TopK: "TopKSAE", BatchTopK: "JumpReLUSAE", JumpReLU: "JumpReLUSAE", ReLU: "StandardSAE"}
    expected = classes[type(seen.dictionary.activation)]
    if seen.dictionary.b_in is not None:
        expected = expected.replace("SAE", "Transcoder").replace("Standard", "")
        assert seen.facts["metadata"]["hook_name_out"] == "layers.2.mlp"
    assert seen.facts["class"] == expected
    assert seen.facts["k"] == (seen.dictionary.k if isinstance(seen.dictionary.activation, TopK) else None)
    assert seen.facts["dtype"] == "torch.float32"
    metadata = seen.facts["metadata"]
    assert metadata["hook_name"] == "layers.2.mlp:in"
    assert metadata["model_name"] == "tiny"
    assert metadata["context_size"] == 64
    assert metadata["prepend_bos"] is True
    assert metadata["sae_lens_version"] == SAELENS_VERSION


def test_saelens_sparsity_of_an_export_is_log10_of_the_density(seen: Seen) -> None:
    # SAELens reads this file from the hub only, by this key.
    sparsity_F = safetensors.numpy.load_file(seen.folder / "sparsity.safetensors")["sparsity"]
    density_F = np.linspace(0.0, 0.5, seen.dictionary.features)
    assert sparsity_F[0] == -10.0
    np.testing.assert_allclose(10.0 ** sparsity_F[1:], density_F[1:], rtol=1e-5)
