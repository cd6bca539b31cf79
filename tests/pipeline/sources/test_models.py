from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertModel

from pipeline.sources import models
from schemas.errors import ManifestError
from schemas.manifest import Model
from tests.support.fixtures import VOCABULARY, WIDTH, make_model


def hub_cache(folder: Path, repository: str, commit: str) -> Path:
    """A hub cache as downloading leaves it: `refs/main` and one snapshot. Returns the snapshot's folder."""
    base = folder / f"models--{repository.replace('/', '--')}"
    snapshot = base / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (base / "refs").mkdir()
    (base / "refs" / "main").write_text(commit)
    return snapshot


def test_inspect_tells_width_and_place_of_every_hook_point_without_weights(tiny_model: Path) -> None:
    hook_points = ["gpt_neox.layers.1", "gpt_neox.layers.0.mlp:in", "gpt_neox.layers.0.mlp.dense_h_to_4h"]
    facts = models.inspect(Model(source=str(tiny_model)), hook_points)
    assert dict(facts.widths) == {hook_points[0]: WIDTH, hook_points[1]: WIDTH, hook_points[2]: 2 * WIDTH}
    assert facts.last_hook_point == "gpt_neox.layers.1"
    assert facts.is_causal_lm
    assert facts.has_bos
    assert facts.vocabulary == VOCABULARY
    loaded = models.load(facts.place)
    assert facts.parameters == sum(parameter.numel() for parameter in loaded.model.parameters())


def test_digest_follows_the_weights_and_not_the_place(tmp_path: Path) -> None:
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        folder = make_model(tmp_path / name, seed=seed)
        found.append(models.inspect(Model(source=str(folder)), ["gpt_neox.layers.1"]).digest)
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_hub_model_is_pinned_to_the_commit_that_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    make_model(hub_cache(tmp_path, "someone/tiny", commit))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    section = Model(source="someone/tiny")
    facts = models.inspect(section, ["gpt_neox.layers.1"])
    assert facts.place.revision == commit
    assert facts.digest == f"hub:someone/tiny@{commit}"
    loaded = models.load(facts.place)
    assert loaded.is_causal_lm


def test_hub_model_that_cannot_be_had_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ManifestError, match="nobody/nothing") as caught:
        models.inspect(Model(source="nobody/nothing"), ["x"])
    assert "\n" not in str(caught.value)


def test_encoder_loads_as_a_model_without_a_head(tmp_path: Path, tiny_model: Path) -> None:
    folder = make_encoder(tmp_path / "bert", tiny_model)
    facts = models.inspect(Model(source=str(folder)), ["encoder.layer.0"])
    assert not facts.is_causal_lm
    loaded = models.load(facts.place)
    assert isinstance(loaded.model, BertModel)
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def make_encoder(folder: Path, tokenizer_from: Path) -> Path:
    """A tiny untrained BERT with the tiny model's tokenizer."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tokenizer_from / name).read_bytes())
    return folder


def test_model_on_several_gpus_without_accelerate_says_what_to_install(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(*_: object, **options: object) -> None:
        assert options["device_map"] == "auto"
        raise ImportError("using a device_map requires accelerate")

    monkeypatch.setattr(models, "device", lambda gpus: torch.device("cuda", 0))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", absent)
    with pytest.raises(ManifestError, match=r"compute\.gpus 3: .* needs accelerate .*kilobasis\[large\]"):
        models.load(Model(source=str(tiny_model)), 3.0)


def test_model_that_is_larger_than_its_gpu_says_what_would_do(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    model = models.load(Model(source=str(tiny_model))).model
    monkeypatch.setattr(type(model), "to", full)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**30, 2**32))
    with pytest.raises(ManifestError, match=r"its GPU has 1\.0 of 4\.0 GiB free -> .*compute\.gpus: 2"):
        models.load(Model(source=str(tiny_model)), 0.25)
