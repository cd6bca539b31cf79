"""Hugging Face models and tokenizers: found, checked and loaded. With `hooks`, all that knows transformers.

Weights are read from safetensors only. A model of the hub is pinned to the commit that planning found.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from torch import nn

from pipeline.sources.hooks import capture, find_module
from pipeline.stage import ModelFacts
from schemas.errors import ManifestError
from schemas.manifest import Model

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab*",
    "merges.txt",
    "*.model",
)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
logging.getLogger("transformers").setLevel(logging.ERROR)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model with its weights."""

    model: nn.Module
    is_causal_lm: bool
    max_context: int | None


def inspect(section: Model, hook_points: Sequence[str]) -> ModelFacts:
    """Find out what planning needs to know, without loading weights.

    Raises:
        ManifestError: no model is there, or a hook point cannot be used.
    """
    folder, revision = _locate(section)
    if not (folder / "config.json").is_file():
        raise ManifestError(
            f"model.source {section.source}: {folder} has no config.json, so it holds no transformers model",
            "name the folder that save_pretrained made, or a name on the Hugging Face hub",
        )
    config = _config(folder, section)
    is_causal_lm = _is_causal_lm(config)
    model = _skeleton(config, is_causal_lm, section)
    for hook_point in hook_points:
        find_module(model, hook_point)
    seen = _probe(model, hook_points, section)
    local = revision is None
    return ModelFacts(
        source=str(folder) if local else section.source,
        revision=revision,
        digest=_digest(folder, ("config.json", "*.safetensors*")) if local else f"hub:{section.source}@{revision}",
        tokenizer_digest=_digest(folder, _TOKENIZER_FILES),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        vocabulary=int(config.get_text_config().vocab_size),
        max_context=getattr(config.get_text_config(), "max_position_embeddings", None),
        widths={hook_point: int(seen[hook_point].shape[-1]) for hook_point in hook_points},
        last_hook_point=list(seen)[-1],
        is_causal_lm=is_causal_lm,
    )


@functools.lru_cache(maxsize=1)
def load(section: Model, facts_source: str, revision: str | None) -> Loaded:
    """The model with its weights, kept for the next call in this process.

    Raises:
        ManifestError: the weights are not there or do not fit the configuration.
    """
    pinned = section.model_copy(update={"source": facts_source, "revision": revision})
    folder, _ = _locate(pinned, weights=True)
    config = _config(folder, section)
    is_causal_lm = _is_causal_lm(config)
    factory = transformers.AutoModelForCausalLM if is_causal_lm else transformers.AutoModel
    try:
        model = factory.from_pretrained(
            str(folder),
            dtype=_DTYPES[section.dtype],
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=section.trust_remote_code,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ManifestError(
            f"the weights of {section.source} cannot be loaded: {error}", "check model.safetensors beside config.json"
        ) from error
    model.eval().requires_grad_(False)
    return Loaded(model, is_causal_lm, getattr(config.get_text_config(), "max_position_embeddings", None))


@functools.lru_cache(maxsize=2)
def load_tokenizer(section: Model, facts_source: str, revision: str | None) -> Any:
    """The model's fast tokenizer.

    Raises:
        ManifestError: there is none.
    """
    folder, _ = _locate(section.model_copy(update={"source": facts_source, "revision": revision}))
    try:
        return transformers.AutoTokenizer.from_pretrained(
            str(folder), use_fast=True, local_files_only=True, trust_remote_code=section.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ManifestError(
            f"the tokenizer of {section.source} cannot be loaded: {error}", "put tokenizer.json beside config.json"
        ) from error


def _locate(section: Model, weights: bool = False) -> tuple[Path, str | None]:
    """The folder with the model's files, and the commit if they come from the hub."""
    folder = Path(section.source).expanduser()
    if folder.is_dir():
        return folder.resolve(), None
    if section.source.startswith(("/", ".", "~")) or section.source.count("/") > 1:
        raise ManifestError(
            f"model.source {section.source}: no folder is there",
            "check the path (relative ones start at the manifest's folder), or give a name on the Hugging Face hub",
        )
    patterns = ["*.json", "*.model", "*.txt", "*.py"] + (["*.safetensors"] if weights else [])
    try:
        found = huggingface_hub.snapshot_download(section.source, revision=section.revision, allow_patterns=patterns)
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError, OSError) as error:
        raise ManifestError(
            f"model.source {section.source}: no folder of that name is here, and the hub does not give it "
            f"({type(error).__name__}: {str(error).splitlines()[0][:160]})",
            "check the name and the network, or download the model and name its folder",
        ) from error
    return Path(found), Path(found).name


def _config(folder: Path, section: Model) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=section.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ManifestError(
            f"model.source {section.source}: config.json cannot be used: {error}", "check the model folder"
        ) from error


def _is_causal_lm(config: Any) -> bool:
    names = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return bool(config.architectures) and config.architectures[0] in names


def _skeleton(config: Any, is_causal_lm: bool, section: Model) -> nn.Module:
    """The model on the meta device: every module and shape, no memory."""
    factory = transformers.AutoModelForCausalLM if is_causal_lm else transformers.AutoModel
    try:
        with torch.device("meta"):
            model: nn.Module = factory.from_config(config, trust_remote_code=section.trust_remote_code)
    except (ValueError, ImportError) as error:
        raise ManifestError(
            f"model.source {section.source}: transformers cannot build it: {error}", "use a supported architecture"
        ) from error
    return model.eval()


def _probe(model: nn.Module, hook_points: Sequence[str], section: Model) -> dict[str, torch.Tensor]:
    """Shapes at the hook points, from a forward pass on the meta device or, where that fails, a real one."""
    try:
        return capture(model, hook_points, {"input_ids": torch.zeros((1, 4), dtype=torch.int64, device="meta")})
    except (NotImplementedError, RuntimeError):
        # Some models look at values on their way; those are loaded for the probe.
        loaded = load(section, section.source, section.revision)
        return capture(loaded.model, hook_points, {"input_ids": torch.zeros((1, 4), dtype=torch.int64)})


def _digest(folder: Path, patterns: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}):
        digest.update(path.name.encode() + b"\0")
        with open(path, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
