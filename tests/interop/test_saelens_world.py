"""Worlds, held against SAELens' own generator with the same settings: what fires, alone and in pairs, and rows.

Neither side's random numbers are the other's, so all comparisons are of samples, within what sampling explains.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from pipeline.synthetic import directions
from pipeline.synthetic.draws import Split
from pipeline.synthetic.features import of_world
from pipeline.synthetic.firing import loadings
from pipeline.synthetic.rows import rows
from pipeline.synthetic.world import WorldSource
from schemas.synthetic import World
from tests.support.runs import PATIENCE
from tests.support.synthetic import dense, world_tree

ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / ".venv-peers" / "bin" / "python"
PROBE = Path(__file__).with_name("saelens_world_probe.py")
FEATURES, WIDTH, ROWS = 160, 24, 120_000
FIRING = {"exponent": 0.5, "max_probability": 0.4, "min_probability": 0.01}


def world_of(correlated: bool) -> World:
    return World.model_validate(
        world_tree(
            features=FEATURES,
            width=WIDTH,
            firing=FIRING,
            magnitudes={"mean": [5.0, 4.0], "std": {"mean": 0.5, "spread": 0.5}},
            hierarchy={"roots": 8, "branching": 3, "depth": 2},
            correlation={"rank": 4, "strength": 0.3} if correlated else None,
            bias=0.5,
        )
    )


def pairs() -> list[tuple[int, int]]:
    """Roots, features of no tree, and parents with their children: pairs whose counts are not tiny."""
    return [
        *itertools.combinations([0, 1, 2, 104, 105, 110], 2),
        *((0, child) for child in (8, 9, 10)),
        (8, 32),
        (8, 9),
    ]


@pytest.fixture(scope="module", params=[False, True], ids=["independent", "correlated"])
def sampled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[World, Any, Path]:
    if not PEERS.exists():
        reason = f"{PEERS} is not there; make it with `make .venv-peers`"
        if os.environ.get("KILOBASIS_REQUIRE_PEERS") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    out, world = tmp_path_factory.mktemp("saelens"), world_of(request.param)
    known = loadings(world.correlation, FEATURES, world.seed)
    given = {
        "std": of_world(world).std_F.astype(np.float32),
        "directions": directions.random_directions(FEATURES, WIDTH, world.seed).numpy(),
        "bias": directions.bias(WIDTH, 0.5, world.seed).numpy(),
        "apart": directions.random_directions(60, 10, 1).numpy(),
    }
    if request.param:
        given["factor"] = known.codebook_CR[known.code_F].astype(np.float32)
    np.savez(out / "given.npz", **given)
    settings = {
        "features": FEATURES,
        "width": WIDTH,
        "firing": {"exponent": 0.5, "max_prob": 0.4, "min_prob": 0.01},
        "hierarchy": {
            "total_root_nodes": 8,
            "branching_factor": 3,
            "max_depth": 2,
            "mutually_exclusive_portion": 1.0,
            "compensate_probabilities": True,
            "scale_children_by_parent": True,
        },
        "mean": [5.0, 4.0],
        "rows": ROWS,
        "pairs": pairs(),
    }
    (out / "settings.json").write_text(json.dumps(settings))
    subprocess.run(
        [str(PEERS), str(PROBE), str(out)],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        timeout=PATIENCE,
    )
    return world, np.load(out / "seen.npz"), out


def ours(world: World) -> tuple[Any, Any]:
    source = WorldSource(world, directions.random_directions(FEATURES, WIDTH, world.seed))
    made = rows(source, Split.TRAIN, 0, ROWS)
    return dense(made.active, FEATURES), made.x_ND.norm(dim=1).numpy()


def test_world_fires_as_saelens_generator_does(sampled: tuple[World, Any, Path]) -> None:
    world, theirs, _ = sampled
    z_NF, norm_N = ours(world)
    on_NF = z_NF > 0
    rate_F, their_rate_F = on_NF.mean(0), theirs["fires"] / ROWS
    error_F = np.sqrt((rate_F * (1 - rate_F) + their_rate_F * (1 - their_rate_F)) / ROWS)
    deviation_F = (rate_F - their_rate_F) / error_F
    assert np.abs(deviation_F).max() < stats.norm.isf(1e-4 / FEATURES)
    assert 0.7 < deviation_F.std() < 1.3
    for place, (one, other) in enumerate(pairs()):
        both, their_both = float((on_NF[:, one] & on_NF[:, other]).mean()), theirs["both"][place] / ROWS
        bound = 5 * np.sqrt((both + their_both + 1 / ROWS) / ROWS)
        assert abs(both - their_both) < bound, (one, other)
    # Magnitudes of what fired, children scaled by their parents among it.
    mean_F, their_mean_F = z_NF.sum(0) / on_NF.sum(0), theirs["total"] / theirs["fires"]
    spread_F = np.array([z_NF[on_NF[:, feature], feature].std() for feature in range(FEATURES)])
    bound_F = 5 * spread_F * np.sqrt(1 / on_NF.sum(0) + 1 / theirs["fires"])
    assert (np.abs(mean_F - their_mean_F) < bound_F).all()
    assert stats.ks_2samp(on_NF.sum(1), theirs["l0"]).pvalue > 1e-3
    assert stats.ks_2samp(norm_N, theirs["norms"]).pvalue > 1e-3


def test_directions_are_pushed_apart_as_saelens_does(sampled: tuple[World, Any, Path]) -> None:
    _, theirs, _ = sampled
    found = directions.pushed_apart(directions.random_directions(60, 10, 1), 30, 0.01)
    torch.testing.assert_close(found, torch.from_numpy(theirs["apart"]), atol=2e-4, rtol=0)
