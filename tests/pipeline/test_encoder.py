"""A model without a language-model head goes through every stage; its output is judged by its embeddings."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.dictionary.stored import from_files
from pipeline.sources import models
from pipeline.sources.hooks import capture, spliced
from schemas.manifest import Model
from tests.pipeline.sources.test_models import make_encoder
from tests.support.fixtures import write_manifest
from tests.support.runs import run_inline


def test_encoder_is_judged_by_the_cosine_of_its_pooled_output(
    tiny_tree: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    folder = make_encoder(tmp_path / "bert", tiny_model)
    tiny_tree["model"]["source"] = str(folder)
    tiny_tree["harvest"]["hook_points"] = ["encoder.layer.0"]
    tiny_tree["dictionaries"][0]["hook_point"] = "encoder.layer.0"
    run_inline(write_manifest(tmp_path / "m.yaml", tiny_tree))
    base = tmp_path / "root" / "dictionaries" / "tiny"
    (judged_path,) = base.glob("evaluate/*/metrics.json")
    judged = json.loads(judged_path.read_text())
    assert "model" not in judged
    assert "ce_loss" not in judged["dictionary"]

    (weights,) = base.glob("train/*/dictionary.safetensors")
    dictionary = from_files([weights.read_bytes()], (weights.parent / "dictionary.json").read_bytes()).dictionary
    model = models.load(Model(source=str(folder))).model
    cosines = []
    sequences = heldout_sequences(tmp_path / "root")
    for tokens in sequences:
        inputs = {"input_ids": torch.tensor([tokens])}
        with torch.inference_mode():
            before = model(**inputs).last_hidden_state.mean(1)
            x_ND = capture(model, ["encoder.layer.0"], inputs)["encoder.layer.0"][0]
            x_hat_ND = dictionary.decode(*dictionary.encode(x_ND))
            with spliced(model, "encoder.layer.0", lambda x_BSD, made=x_hat_ND: made[None]):
                after = model(**inputs).last_hidden_state.mean(1)
        cosines.append(float(torch.nn.functional.cosine_similarity(before, after)))
    assert judged["tokens"] == sum(len(tokens) for tokens in sequences)
    assert judged["dictionary"]["output_cosine"] == pytest.approx(sum(cosines) / len(cosines), abs=1e-4)
    (report,) = base.glob("catalog/*/report.html")
    assert b"Output cosine" in report.read_bytes()


def heldout_sequences(root: Path) -> list[list[int]]:
    """Held-out sequences, as they were tokenized."""
    import pyarrow.parquet as pq

    return [
        tokens
        for path in sorted(root.glob("tokenize/*/heldout/*.parquet"))
        for tokens in pq.read_table(path)["tokens"].to_pylist()
    ]
