"""Samples a world with the real SAELens generator: `saelens_world_probe.py OUT`.

Standalone, because it runs in the peers' environment. OUT holds `settings.json` and `given.npz` (factor, std,
directions, bias, apart) and gets `seen.npz`: what fired how often, alone and in pairs, and what rows look like.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

BATCH = 4000
# SAELens' synthetic package imports these for plots and matchings, which sampling needs neither of.
UNUSED = ("plotly", "plotly.graph_objects", "plotly.subplots", "plotly.express", "scipy", "scipy.optimize")


class Unused(ModuleType):
    """Stands where a library is not installed."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return object


def stand_in() -> None:
    """Let what is not there be imported."""
    absent = {name for name in UNUSED if "." not in name and importlib.util.find_spec(name) is None}
    for name in UNUSED:
        if name.partition(".")[0] in absent:
            sys.modules[name] = Unused(name)
            sys.modules[name].__spec__ = ModuleSpec(name, None)


def probe(out: Path) -> None:
    """Build the world, sample it, and write down what came out."""
    # Here, so that whoever collects doctests can import this file without SAELens; first what asks which libraries are
    # there.
    import sae_lens  # type: ignore[import-not-found]  # noqa: F401

    stand_in()
    from sae_lens.synthetic import (  # type: ignore[import-not-found]
        HierarchyConfig,
        LinearMagnitudeConfig,
        LowRankCorrelationMatrix,
        SyntheticModel,
        SyntheticModelConfig,
        ZipfianFiringProbabilityConfig,
        orthogonalize_embeddings,
    )

    torch.manual_seed(0)
    settings, given = json.loads((out / "settings.json").read_text()), np.load(out / "given.npz")
    correlation = None
    if "factor" in given:
        factor = torch.from_numpy(given["factor"])
        correlation = LowRankCorrelationMatrix(factor, 1.0 - factor.square().sum(1))
    config = SyntheticModelConfig(
        num_features=settings["features"],
        hidden_dim=settings["width"],
        firing_probability=ZipfianFiringProbabilityConfig(**settings["firing"]),
        hierarchy=HierarchyConfig(**settings["hierarchy"]),
        mean_firing_magnitudes=LinearMagnitudeConfig(*settings["mean"]),
        seed=0,
    )
    model = SyntheticModel(config, correlation_matrix=correlation)
    model.activation_generator.std_firing_magnitudes = torch.from_numpy(given["std"])
    model.feature_dict.feature_vectors.data = torch.from_numpy(given["directions"])
    model.feature_dict.bias.data = torch.from_numpy(given["bias"])
    pairs = torch.tensor(settings["pairs"])
    features = settings["features"]
    fires, total, both, l0, norms = torch.zeros(features), torch.zeros(features), torch.zeros(len(pairs)), [], []
    for _ in range(settings["rows"] // BATCH):
        x_BD, z_BF = model.sample_with_features(BATCH)
        on = z_BF > 0
        fires += on.sum(0)
        total += z_BF.sum(0)
        both += (on[:, pairs[:, 0]] & on[:, pairs[:, 1]]).sum(0)
        l0.append(on.sum(1))
        norms.append(x_BD.norm(dim=1))
    apart = orthogonalize_embeddings(torch.from_numpy(given["apart"]), num_steps=30, lr=0.01)
    np.savez(
        out / "seen.npz",
        fires=fires.numpy(),
        total=total.numpy(),
        both=both.numpy(),
        l0=torch.cat(l0).numpy(),
        norms=torch.cat(norms).numpy(),
        apart=apart.numpy(),
    )


if __name__ == "__main__":
    probe(Path(sys.argv[1]))
