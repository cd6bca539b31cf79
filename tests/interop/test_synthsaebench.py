"""The recovery metrics that SynthSAEBench publishes, against the functions that its numbers were made with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.recovery.firings import Firings
from pipeline.recovery.matches import links, match
from pipeline.recovery.summary import recovery
from tests.interop import peers
from tests.pipeline.recovery.worlds import code, directions, near, sparse

PROBE = Path(__file__).with_name("synthsaebench_probe.py")
TOLERANCE = 1e-5
TOKENS = 600
PUBLISHED = ("mcc", "uniqueness", "precision", "recall", "f1", "accuracy")


@dataclass(frozen=True)
class Case:
    """A dictionary, a world, and what of both fires at 600 tokens."""

    W_dec_FD: torch.Tensor
    true_MD: torch.Tensor
    latents_NF: torch.Tensor
    active_NM: torch.Tensor


def case(learned: int, true: int, width: int, seed: int) -> Case:
    """Learned features of all qualities, lengths and signs; they fire for what they resemble, and for other reasons."""
    generator = torch.Generator().manual_seed(seed)
    true_MD = directions(true, width, seed)
    which_F = torch.randint(true, (learned,), generator=generator)
    W_dec_FD = near(true_MD[which_F], torch.rand(learned, generator=generator), seed + 1)
    W_dec_FD *= torch.rand(learned, 1, generator=generator) + 0.5
    W_dec_FD[torch.rand(learned, generator=generator) < 0.2] *= -1
    active_NM = (torch.rand(TOKENS, true, generator=generator) < 0.1) * torch.rand(TOKENS, true, generator=generator)
    noise_NF = torch.rand(TOKENS, learned, generator=generator)
    fires_NF = torch.where(noise_NF < 0.8, active_NM[:, which_F] > 0, noise_NF < 0.85)
    latents_NF = fires_NF * (torch.rand(TOKENS, learned, generator=generator) + 0.1)
    # Two that are dead, one of them without a direction, and one that always fires.
    latents_NF[:, :2] = 0.0
    W_dec_FD[0] = 0.0
    latents_NF[:, 2] = 1.0
    return Case(W_dec_FD, true_MD, latents_NF, active_NM)


CASES = {"overcomplete": case(70, 40, 16, 0), "square": case(50, 50, 16, 1), "undercomplete": case(30, 80, 24, 2)}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """What SAELens says of each case."""
    peers.required()
    folder = tmp_path_factory.mktemp("synthsaebench")
    arrays = {}
    for name, each in CASES.items():
        parts = {"W_dec": each.W_dec_FD, "true": each.true_MD, "latents": each.latents_NF, "active": each.active_NM}
        arrays |= {f"{name}.{part}": tensor.numpy() for part, tensor in parts.items()}
    np.savez(folder / "cases.npz", **arrays)
    peers.run(PROBE, folder / "cases.npz", folder / "judged.json")
    judged: dict[str, dict[str, float]] = json.loads((folder / "judged.json").read_text())
    return judged


@pytest.mark.parametrize("name", CASES)
def test_recovery_of_any_dictionary_is_what_saelens_says(name: str, published: dict[str, dict[str, float]]) -> None:
    each = CASES[name]
    matches = match(each.W_dec_FD, each.true_MD)
    by = links(matches)
    firings = Firings.none(by)
    for learned, active in zip(each.latents_NF.split(250), each.active_NM.split(250), strict=True):
        firings.add(by, *code(learned, learned.shape[1]), *sparse(active))
    made = recovery(matches, by, firings, firings.learned_F > 0, firings.true_M)
    assert {key: made.metrics[key] for key in PUBLISHED} == pytest.approx(published[name], abs=TOLERANCE)
