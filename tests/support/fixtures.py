"""A tiny model, a tiny corpus and a manifest over both: a whole run takes seconds."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

WORDS = tuple("the cat sat on a mat and saw that dog run past old trees while rain fell over hills".split(" "))  # noqa: SIM905
WIDTH, CONTEXT, VOCABULARY = 16, 32, 384
HOOK_POINT = "gpt_neox.layers.1"


def documents(count: int, seed: int = 0) -> list[str]:
    """Sentences of random words, between 5 and 120 of them a document."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(5, 120))) + f" {index}" for index in range(count)]


def make_model(folder: Path, width: int = WIDTH, seed: int = 0) -> Path:
    """An untrained two-layer GPT-NeoX with a byte-level tokenizer."""
    torch.manual_seed(seed)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents(50), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", model_max_length=CONTEXT
    )
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def make_corpus(folder: Path, count: int = 120, files: int = 3, seed: int = 0) -> Path:
    """JSONL files of `documents`."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = documents(count, seed)
    for index in range(files):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[index::files])
        (folder / f"part-{index}.jsonl").write_text(lines)
    return folder


def manifest_tree(model: Path, corpus: Path, root: Path) -> dict[str, Any]:
    """A manifest that runs inline in a few seconds."""
    return {
        "name": "tiny",
        "root": str(root),
        "model": {"source": str(model)},
        "corpus": {"source": str(corpus), "context": CONTEXT, "heldout": 0.2},
        "harvest": {"hook_points": [HOOK_POINT, "gpt_neox.layers.0.mlp:in"], "batch_tokens": 512, "dtype": "float32"},
        "dictionaries": [
            {
                "name": "tiny",
                "hook_point": HOOK_POINT,
                "features": 64,
                "k": 4,
                "train": {"tokens": 8192, "batch": 256, "learning_rate": 3e-3, "dead_after": 2048},
                "evaluate": {"tokens": 2048},
                "catalog": {"tokens": 100_000, "examples": 3, "window": 4},
            }
        ],
        "compute": {"pool": "inline", "rank_threads": 1, "checkpoint_seconds": 0.2},
    }


def write_manifest(path: Path, tree: dict[str, Any]) -> Path:
    """The tree as a YAML file."""
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny model; do not change it."""
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny corpus; do not change it."""
    return make_corpus(tmp_path_factory.mktemp("corpus") / "corpus")


@pytest.fixture
def tiny_tree(tiny_model: Path, tiny_corpus: Path, tmp_path: Path) -> dict[str, Any]:
    """The tiny manifest as a dict, with its root in the test's own folder."""
    return manifest_tree(tiny_model, tiny_corpus, tmp_path / "root")


@pytest.fixture
def tiny_manifest(tiny_tree: dict[str, Any], tmp_path: Path) -> Path:
    """The tiny manifest as a file."""
    return write_manifest(tmp_path / "tiny.yaml", tiny_tree)
