"""A tree through the stages behind training: what is said of it, and what of it another tool can load."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from pipeline import evaluate
from pipeline.activations.source import open_store
from pipeline.dictionary.audit import audit
from pipeline.dictionary.model import TreeShape
from pipeline.dictionary.ranks import Ranks
from pipeline.dictionary.stored import open_dictionary
from pipeline.dictionary.tree import TreeDictionary
from pipeline.stage import Committed
from schemas import events
from tests.support.fixtures import HOOK_POINT, manifest_tree
from tests.support.stages import Run, manifest_of, run_stage

STAGES = ("train", "evaluate", "catalog", "export")


@pytest.fixture(scope="module")
def grown(tiny_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Committed]:
    """The stages of a run whose dictionary is a tree."""
    folder = tmp_path_factory.mktemp("grown")
    tree = manifest_tree(tiny_run.model, tiny_run.corpus, folder / "root")
    tree["dictionaries"][0] |= {
        "features": 256,
        "k": 6,
        "tree": {"children": 7, "coarse_k": 2, "routed": 3, "always": 1},
    }
    tree["dictionaries"][0]["train"] |= {"dead_after": 1024, "resample": 2048}
    done = dict(tiny_run.stages)
    for name in STAGES:
        done[name] = run_stage(name, manifest_of(tree), folder / name, done)
    return done


def metrics(done: Mapping[str, Committed]) -> dict[str, Any]:
    return json.loads((done["evaluate"].path.local / "metrics.json").read_text())


def test_tree_explains_more_than_its_parents_and_than_its_rows_would_without_it(grown: Mapping[str, Committed]) -> None:
    judged = metrics(grown)
    assert judged["dictionary"]["fvu"] < judged["parents"]["fvu"] < 1
    assert judged["dictionary"]["l0"] == pytest.approx(6, abs=0.5)
    assert judged["parents"]["l0"] == pytest.approx(2, abs=0.2)
    audited = judged["audit"]
    assert 0 < audited["tokens"] <= evaluate.AUDIT_ROWS
    assert 0 < audited["routing_recall"] < 1
    assert audited["fvu_refitted"] < audited["fvu_encoded"] < audited["fvu_flat"]
    assert audited["gap"] == pytest.approx(audited["fvu_encoded"] / audited["fvu_exact"] - 1)


def test_audit_searches_all_children(grown: Mapping[str, Committed]) -> None:
    tree = open_dictionary(grown["train"]).dictionary
    assert isinstance(tree, TreeDictionary)
    x_ND = open_store(grown["harvest"]).slab(HOOK_POINT, 0).x_ND.float()[:200]
    made, code = audit(tree, x_ND), tree.code(x_ND, Ranks())
    scores_NF = code.residual_BD @ tree.W_enc.T + tree.b_enc
    scores_NF[:, ::8] = 0
    best = scores_NF.relu().topk(4)
    assert made.wanted == int((best.values > 0).sum())
    hits = [
        [feature // 8 in routed for feature, z in zip(features, values, strict=True) if z > 0]
        for features, values, routed in zip(
            best.indices.tolist(), best.values.tolist(), code.routed_BP.tolist(), strict=True
        )
    ]
    assert made.found == sum(map(sum, hits))
    # Where every parent's children are searched there is nothing left to find.
    everywhere = TreeDictionary(tree.width, 256, 6, TreeShape(children=7, coarse_k=2, routed=2, always=32))
    everywhere.load_state_dict(tree.state_dict())
    made = audit(everywhere, x_ND)
    assert made.found == made.wanted
    torch.testing.assert_close(made.exact_ND, everywhere.decode(*everywhere.encode(x_ND)), rtol=1e-4, atol=1e-4)


def test_gap_that_is_too_large_is_told() -> None:
    told: list[events.Event] = []
    for judged in ({}, {"audit": {"gap": 0.01}}, {"audit": {"gap": 0.5}}):
        evaluate.warn(judged, "evaluate/x", told.append)
    (note,) = told
    assert isinstance(note, events.Note)
    assert "FVU is 50% higher" in note.text
    assert "raise tree.routed" in note.text


def test_report_of_a_tree_says_what_it_is(grown: Mapping[str, Committed]) -> None:
    page = (grown["catalog"].path.local / "report.html").read_text()
    assert "32 parents, 7 children each" in page
    assert "Its parents alone" in page
    assert "of the best of all" in page
    assert "in place of" in page


def test_export_of_a_tree_is_its_parents(grown: Mapping[str, Committed]) -> None:
    """What a TopK dictionary with these weights makes is what parents make alone."""
    folder = grown["export"].path.local / "saelens"
    config = json.loads((folder / "cfg.json").read_text())
    assert (config["architecture"], config["d_sae"], config["k"]) == ("topk", 32, 2)
    assert config["metadata"]["kilobasis_level"] == "parents"
    weights = safetensors.torch.load_file(folder / "sae_weights.safetensors")
    tree = open_dictionary(grown["train"]).dictionary
    x_ND = open_store(grown["harvest"]).slab(HOOK_POINT, 0).x_ND.float()[:100]
    best = ((x_ND - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]).relu().topk(2)
    z_NF = torch.zeros(100, 32).scatter_(1, best.indices, best.values)
    expected_ND, _ = tree.parents_alone(x_ND)
    torch.testing.assert_close(z_NF @ weights["W_dec"] + weights["b_dec"], expected_ND, rtol=1e-4, atol=1e-4)
    sparsity = safetensors.torch.load_file(folder / "sparsity.safetensors")["sparsity"]
    assert np.isfinite(sparsity.numpy()).all()
    assert len(sparsity) == 32
