"""Hugging Face models and tokenizers: found, checked and loaded. With `hooks`, all that knows transformers.

Weights are read from safetensors only. A model of the hub is pinned to the commit that planning found.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import safetensors
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from torch import nn

from cluster.storage.redaction import first_line
from pipeline.device import HOST, device
from pipeline.sources.hooks import capture, find_module
from pipeline.stage import ModelFacts
from schemas.errors import ManifestError
from schemas.manifest import Model

_MODEL_FILES = ("config.json", "*.safetensors*")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab*",
    "merges.txt",
    "*.model",
)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model with its weights. `device` is where its inputs go."""

    model: nn.Module
    is_causal_lm: bool
    max_context: int | None
    device: torch.device = HOST

    def placed(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Inputs where the model is."""
        return {name: value.to(self.device) for name, value in inputs.items()}


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
    if revision is None:
        _require_weights(folder, section, model)
    for hook_point in hook_points:
        find_module(model, hook_point)
    local = revision is None
    place = section.model_copy(update={"source": str(folder)} if local else {"revision": revision})
    seen = _probe(model, hook_points, place)
    tokenizer = load_tokenizer(place)
    code = ("*.py",) if section.trust_remote_code else ()
    return ModelFacts(
        place=place,
        digest=_digest(folder, _MODEL_FILES + code) if local else f"hub:{section.source}@{revision}",
        tokenizer_digest=_digest(folder, _TOKENIZER_FILES),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        vocabulary=int(config.get_text_config().vocab_size),
        max_context=getattr(config.get_text_config(), "max_position_embeddings", None),
        widths={hook_point: int(seen[hook_point].shape[-1]) for hook_point in hook_points},
        last_hook_point=list(seen)[-1],
        is_causal_lm=is_causal_lm,
        has_bos=tokenizer.bos_token_id is not None or tokenizer.cls_token_id is not None,
    )


@functools.lru_cache(maxsize=1)
def load(place: Model, gpus: float = 0.0) -> Loaded:
    """The model with its weights, kept for the next call in this process.

    Args:
        place: Which one.
        gpus: What this worker was given. One, or a part of one, has all of the model; several have some layers each.

    Raises:
        ManifestError: the weights are not there, do not fit the configuration, or have no room.
    """
    folder, _ = _locate(place, weights=True)
    config = _config(folder, place)
    is_causal_lm = _is_causal_lm(config)
    factory = _factory(is_causal_lm)
    target = device(gpus)
    spread = target.type == "cuda" and gpus > 1
    try:
        model, found = factory.from_pretrained(
            str(folder),
            output_loading_info=True,
            dtype=_DTYPES[place.dtype],
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=place.trust_remote_code,
            **({"device_map": "auto"} if spread else {}),
        )
    except ImportError as error:
        raise ManifestError(
            f"compute.gpus {gpus:g}: a model on several GPUs needs accelerate ({first_line(str(error), 160)})",
            "pip install 'kilobasis[large]' on every machine, or set compute.gpus to 1",
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise ManifestError(
            f"the weights of {place.source} cannot be loaded: {error}", "check model.safetensors beside config.json"
        ) from error
    # A pooler comes behind every hook point, and checkpoints of language models have none.
    absent = sorted(name for name in found["missing_keys"] if not name.startswith("pooler."))
    if absent:
        raise ManifestError(
            f"the weights of {place.source} lack {len(absent)} tensors that its config.json asks for, "
            f"{', '.join(absent[:3])} among them",
            "restore the model from a copy; what is absent would be random numbers",
        )
    model.eval().requires_grad_(False)
    # Nothing is generated, and a cache of keys and values would cost memory and time in every pass.
    model.config.use_cache = False
    if not spread:
        _move(model, target, place)
    return Loaded(model, is_causal_lm, getattr(config.get_text_config(), "max_position_embeddings", None), target)


def _move(model: nn.Module, target: torch.device, place: Model) -> None:
    try:
        model.to(target)
    except torch.OutOfMemoryError as error:
        needed = sum(each.numel() * each.element_size() for each in model.parameters())
        free, total = torch.cuda.mem_get_info(target)
        raise ManifestError(
            f"{place.source} has {needed / 2**30:.1f} GiB of weights, its GPU has {free / 2**30:.1f} of "
            f"{total / 2**30:.1f} GiB free",
            "set model.dtype to bfloat16, let fewer workers share a GPU, or give each several (compute.gpus: 2)",
        ) from error


@functools.lru_cache(maxsize=2)
def load_tokenizer(place: Model) -> Any:
    """The model's fast tokenizer.

    Raises:
        ManifestError: there is none.
    """
    folder, _ = _locate(place)
    if not any(path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern)):
        # transformers would make one that knows no token.
        raise ManifestError(
            f"model.source {place.source}: {folder} holds no tokenizer", "put tokenizer.json beside config.json"
        )
    try:
        return _transformers().AutoTokenizer.from_pretrained(
            str(folder), use_fast=True, local_files_only=True, trust_remote_code=place.trust_remote_code
        )
    except Exception as error:  # whatever the tokenizer's own code thinks of its files
        raise ManifestError(
            f"the tokenizer of {place.source} cannot be loaded: {error}", "put tokenizer.json beside config.json"
        ) from error


@functools.cache
def _transformers() -> Any:
    """Brought in by who loads a model: it costs a process most of a second, and most know no model."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return transformers


def _locate(section: Model, weights: bool = False) -> tuple[Path, str | None]:
    """The folder with the model's files, and the commit if they come from the hub."""
    folder = Path(section.source).expanduser()
    if folder.is_dir():
        return folder.absolute(), None
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
            f"({type(error).__name__}: {first_line(str(error), 160)})",
            "check the name and the network, or download the model and name its folder",
        ) from error
    return Path(found), Path(found).name


def _require_weights(folder: Path, section: Model, model: nn.Module) -> None:
    """Refuse a folder whose weights are absent, cut short or of another shape; reads headers only."""
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise ManifestError(
            f"model.source {section.source}: {folder} has no *.safetensors, the only kind of weights that is read",
            "save the model again with save_pretrained",
        )
    for path in found:
        try:
            with safetensors.safe_open(path, "pt") as weights:
                shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
        except safetensors.SafetensorError as error:
            raise ManifestError(
                f"model.source {section.source}: {path.name} is damaged ({error})", "restore the file from a copy"
            ) from error
        for name, shape in shapes.items():
            if shape != expected.get(name, shape):
                raise ManifestError(
                    f"model.source {section.source}: {path.name} has {name} of shape {shape}, config.json makes it "
                    f"{expected[name]}",
                    "put config.json and weights of one model together",
                )


def _config(folder: Path, section: Model) -> Any:
    if section.trust_remote_code:
        _require_own_code(folder, section)
    try:
        return _transformers().AutoConfig.from_pretrained(str(folder), trust_remote_code=section.trust_remote_code)
    except Exception as error:  # whatever the configuration's own class thinks of the file
        raise ManifestError(
            f"model.source {section.source}: config.json cannot be used: {error}", "check the model folder"
        ) from error


def _require_own_code(folder: Path, section: Model) -> None:
    """Refuse code of another repository, which no revision pins."""
    for name in ("config.json", "tokenizer_config.json"):
        found: Any = None
        # What is wrong with the file is said by whoever needs it.
        with suppress(OSError, ValueError, RecursionError):
            found = json.loads((folder / name).read_text("utf-8"))
        if isinstance(found, dict) and "--" in str(found.get("auto_map")):
            raise ManifestError(
                f"model.source {section.source}: {name} takes code from another repository, which is not pinned",
                "copy the code beside config.json and correct auto_map",
            )


def _factory(is_causal_lm: bool) -> Any:
    library = _transformers()
    return library.AutoModelForCausalLM if is_causal_lm else library.AutoModel


def _is_causal_lm(config: Any) -> bool:
    names = _transformers().models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return isinstance(config.architectures, list) and any(name in names for name in config.architectures[:1])


def _skeleton(config: Any, is_causal_lm: bool, section: Model) -> nn.Module:
    """The model on the meta device: every module and shape, no memory."""
    factory = _factory(is_causal_lm)
    try:
        with torch.device("meta"):
            model: nn.Module = factory.from_config(config, trust_remote_code=section.trust_remote_code)
    except Exception as error:  # whatever the model's own code thinks of the configuration
        raise ManifestError(
            f"model.source {section.source}: transformers cannot build it: {error}", "use a supported architecture"
        ) from error
    return model.eval()


def _probe(model: nn.Module, hook_points: Sequence[str], place: Model) -> dict[str, torch.Tensor]:
    """Shapes at the hook points, from a forward pass on the meta device or, where that fails, a real one."""
    ids_BS = torch.zeros((2, 4), dtype=torch.int64)
    try:
        seen = capture(model, hook_points, {"input_ids": ids_BS.to("meta")})
    except (NotImplementedError, RuntimeError):
        # Some models look at values on their way; those are loaded for the probe.
        loaded = load(place)
        seen = capture(loaded.model, hook_points, {"input_ids": ids_BS})
    for hook_point, x_BSD in seen.items():
        if x_BSD.shape[:2] != ids_BS.shape:
            raise ManifestError(
                f"hook point {hook_point!r}: shape {tuple(x_BSD.shape)} for a batch of 2 and 4 positions, "
                "expected (batch, position, width)",
                "choose another module of the model",
            )
    return seen


def _digest(folder: Path, patterns: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}):
        digest.update(path.name.encode() + b"\0")
        with open(path, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
