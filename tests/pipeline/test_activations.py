"""Dictionaries of every activation through all stages, side by side in one run."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from jobs import manifest as manifests
from jobs.log import TrainingLog
from jobs.runner import run
from pipeline.stage import Committed
from schemas.layouts import CURVES, DICTIONARY, METRICS
from tests.pipeline.test_train import DiesAtStepError, crash_at
from tests.support.fixtures import HOOK_POINT, manifest_tree, write_manifest
from tests.support.runs import run_inline

KINDS: dict[str, dict[str, Any]] = {
    "batch_topk": {"activation": "batch_topk", "train": {"prefixes": [16, 32]}},
    "jumprelu": {"activation": "jumprelu"},
    "relu": {"activation": "relu", "train": {"sparsity": 0.5}},
    "transcoder": {
        "activation": "jumprelu",
        "hook_point": None,
        "transcode": {"from": "gpt_neox.layers.0.mlp:in", "to": HOOK_POINT},
    },
}


def tree_of(model: Path, corpus: Path, root: Path) -> dict[str, Any]:
    """The tiny manifest with a dictionary of each kind."""
    tree = manifest_tree(model, corpus, root)
    (base,) = tree["dictionaries"]
    tree["dictionaries"] = [
        {**base, **kind, "name": name, "train": {**base["train"], **kind.get("train", {})}}
        for name, kind in KINDS.items()
    ]
    return tree


@pytest.fixture(scope="module")
def done(tiny_model: Path, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Committed]:
    """All stages of all of them, by label."""
    folder = tmp_path_factory.mktemp("kinds")
    path = write_manifest(folder / "m.yaml", tree_of(tiny_model, tiny_corpus, folder / "root"))
    return dict(run(manifests.load(path)))


@pytest.mark.parametrize("name", KINDS)
def test_dictionary_learns_and_is_judged_by_what_fires_outside_of_training(
    name: str, done: dict[str, Committed]
) -> None:
    curves = pq.read_table((done[f"train/{name}"].path / CURVES).local).to_pandas()
    assert curves["fvu"].iloc[-3:].mean() < 0.9 * curves["fvu"].iloc[:3].mean()
    judged = json.loads((done[f"evaluate/{name}"].path / METRICS).local.read_bytes())
    assert 0 < judged["dictionary"]["fvu"] < 1
    # A token alone fires as many as its batch did.
    assert judged["dictionary"]["l0"] == pytest.approx(curves["l0"].iloc[-3:].mean(), rel=0.35)


@pytest.mark.parametrize("name", KINDS)
def test_export_says_how_the_dictionary_fires(name: str, done: dict[str, Committed]) -> None:
    folder = (done[f"export/{name}"].path / "saelens").local
    expected = {
        "batch_topk": "jumprelu",
        "jumprelu": "jumprelu",
        "relu": "standard",
        "transcoder": "jumprelu_transcoder",
    }[name]
    assert json.loads((folder / "cfg.json").read_text())["architecture"] == expected
    weights = safetensors.torch.load_file(folder / "sae_weights.safetensors")
    assert ("threshold" in weights) == (name != "relu")
    if name == "batch_topk":
        assert weights["threshold"].unique().numel() == 1
    if name == "jumprelu":
        assert weights["threshold"].unique().numel() > 1
        assert (weights["threshold"] >= 0).all()
    saved = safetensors.torch.load_file((done[f"train/{name}"].path / DICTIONARY).local)
    torch.testing.assert_close(weights["W_enc"], saved["W_enc"].T)


@pytest.mark.parametrize("name", KINDS)
def test_training_interrupted_resumes_to_the_same_bits(
    name: str,
    done: dict[str, Committed],
    tiny_model: Path,
    tiny_corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Thresholds, their moments and the weight of sparsity go on as well."""
    tree = tree_of(tiny_model, tiny_corpus, tmp_path / "root")
    tree["dictionaries"] = [each for each in tree["dictionaries"] if each["name"] == name]
    tree["dictionaries"][0]["name"] = "tiny"
    tree["compute"]["checkpoint_seconds"] = 1e-9
    path = write_manifest(tmp_path / "m.yaml", tree)
    crash_at(monkeypatch, 17, slots=2, root=tmp_path / "root")
    with pytest.raises(DiesAtStepError):
        run_inline(path)
    (folder,) = (tmp_path / "root" / "dictionaries" / "tiny" / "train").iterdir()
    assert TrainingLog(manifests.StoragePath.parse(folder)).latest() is not None
    run_inline(path)
    for key in (DICTIONARY, CURVES):
        assert (folder / key).read_bytes() == (done[f"train/{name}"].path / key).local.read_bytes(), key
