"""export: the dictionary in the layouts that other tools load.

SAELens 6: `cfg.json`, `sae_weights.safetensors` and `sparsity.safetensors` in one folder; loads with
`SAE.load_from_disk`. Weights are the ones of raw activations, decoder rows have unit norm, so nothing is
left to fold on loading.

A tree's inference has no place there: children see what parents leave, which no encoder of that format does. Its
parents are a TopK dictionary by themselves, trained as one, and that is what is exported; `metadata` says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch

from cluster.storage.create import LARGEST_OBJECT
from cluster.storage.formats import read_table
from cluster.storage.path import StoragePath
from pipeline.dictionary.model import DictionaryConfig, TopKDictionary
from pipeline.dictionary.stored import open_dictionary
from pipeline.stage import Committed, Estimate, Out, Params, Sources
from schemas.errors import ManifestError
from schemas.layouts import FEATURES
from schemas.manifest import Dictionary, Manifest
from schemas.quantities import size
from schemas.records import Outputs
from schemas.tables import FEATURE_STATISTICS

# The loader migrates files that do not name a version from 6 on.
SAELENS_VERSION = "6.54.12"
# What its inference is called there. A trained BatchTopK looks at one token at a time, so it is a JumpReLU.
SAELENS_ARCHITECTURES = {"topk": "topk", "batch_topk": "jumprelu", "jumprelu": "jumprelu", "relu": "standard"}
SAELENS_TRANSCODERS = {"batch_topk": "jumprelu_transcoder", "jumprelu": "jumprelu_transcoder", "relu": "transcoder"}


class ExportParams(Params):
    """Identity of an export."""

    formats: tuple[str, ...]
    context: int
    has_bos: bool
    model_class: str


def params(manifest: Manifest, dictionary: Dictionary | None, sources: Sources) -> ExportParams:
    """See `Stage.params`."""
    assert dictionary is not None
    corpus = manifest.corpus
    return ExportParams(
        formats=dictionary.export,
        # A row of a synthetic source is a sequence of its own.
        context=1 if corpus is None else corpus.context,
        has_bos=sources.model.has_bos and corpus is not None and corpus.bos != "never",
        model_class="AutoModelForCausalLM" if sources.model.is_causal_lm else "AutoModel",
    )


def check(manifest: Manifest, dictionary: Dictionary | None, sources: Sources) -> None:
    """Refuse what a layout has no place for."""
    assert dictionary is not None
    if dictionary.transcode is not None and dictionary.activation == "topk" and "saelens" in dictionary.export:
        raise ManifestError(
            f"dictionary {dictionary.name!r}: SAELens has no transcoder with activation topk",
            "set activation to batch_topk, or export to []",
        )
    largest = _weights(dictionary, sources) // (1 if dictionary.tree is None else dictionary.tree.size)
    if dictionary.export and largest > LARGEST_OBJECT and not StoragePath.parse(manifest.root).is_local:
        raise ManifestError(
            f"dictionary {dictionary.name!r}: SAELens has all weights in one file, here of {size(largest)}; a bucket "
            f"takes at most {size(LARGEST_OBJECT)} in one object",
            "set export to [], or root to a folder; what was trained is kept in several files by itself",
        )


def _weights(dictionary: Dictionary, sources: Sources) -> int:
    """Bytes of a dictionary's weights."""
    width, target = sources.model.widths[dictionary.encoded], sources.model.widths[dictionary.explained]
    return (width + target + 1) * dictionary.size(width) * 4


def estimate(manifest: Manifest, dictionary: Dictionary | None, sources: Sources) -> Estimate:
    """See `Stage.estimate`. Runs in the driver."""
    assert dictionary is not None
    weights, count = _weights(dictionary, sources), len(dictionary.export)
    return Estimate(0, 0, count * weights, 3 * count + 2, 600 * 2**20 + 5 * weights, 1)


def run(inputs: Mapping[str, Committed], params: ExportParams, out: Out) -> Outputs:
    """Write every layout that was asked for."""
    saved = open_dictionary(inputs["train"])
    catalog = inputs["catalog"]
    features = read_table(catalog.path, catalog.entry(FEATURES), FEATURE_STATISTICS)
    density_F = np.asarray(features["density"])
    objects = []
    for name in params.formats:
        made = {"saelens": saelens_files}[name](saved.dictionary, saved.config, density_F, params)
        objects += [out.write(f"{name}/{key}", body) for key, body in made.items()]
    return Outputs(objects=tuple(objects), facts={"formats": list(params.formats)})


def saelens_files(
    dictionary: TopKDictionary, config: DictionaryConfig, density_F: np.ndarray[Any, Any], settings: ExportParams
) -> dict[str, bytes]:
    """A SAELens 6 folder.

    Args:
        dictionary: Weights for raw activations.
        config: Where it comes from.
        density_F: Share of tokens on which each feature fires. Shape (F,).
        settings: Context and BOS policy of the corpus.

    Returns:
        File contents by name. `sparsity` is log10 of the density, -10 for a feature that never fired.
    """
    level, metadata = _flat(dictionary, config)
    transcodes = config.target is not None
    architectures = SAELENS_TRANSCODERS if transcodes else SAELENS_ARCHITECTURES
    metadata |= {"hook_name_out": config.target} if transcodes else {}
    cfg = {
        "architecture": architectures[config.activation],
        "d_in": config.width,
        **({"d_out": config.target_width} if transcodes else {}),
        "d_sae": len(level.W_enc),
        **({"k": level.k} if config.activation == "topk" else {}),
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": not transcodes,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
        "metadata": {
            "sae_lens_version": SAELENS_VERSION,
            "sae_lens_training_version": None,
            "model_name": config.model,
            "model_class_name": settings.model_class,
            "hook_name": config.hook_point,
            "hf_hook_name": config.hook_point,
            "hook_head_index": None,
            "context_size": settings.context,
            "prepend_bos": settings.has_bos,
            "neuronpedia_id": None,
            **metadata,
        },
    }
    weights = {
        "W_enc": level.W_enc.T.contiguous(),
        # There is no bias on a transcoder's input there; taking it off is adding to the other one.
        "b_enc": level.b_enc if dictionary.b_in is None else level.b_enc - level.W_enc @ dictionary.b_in,
        "W_dec": level.W_dec,
        "b_dec": dictionary.b_dec,
    }
    if dictionary.threshold is not None:
        weights["threshold"] = dictionary.threshold
    sparsity_F = torch.from_numpy(np.log10(np.maximum(density_F[:: level.every], 1e-10))).float()
    return {
        "cfg.json": json.dumps(cfg, indent=1, sort_keys=True).encode() + b"\n",
        "sae_weights.safetensors": safetensors.torch.save(weights),
        "sparsity.safetensors": safetensors.torch.save({"sparsity": sparsity_F}),
    }


class _Level(NamedTuple):
    """Features that a flat layout can hold: all of them, or every so many-th."""

    W_enc: torch.Tensor
    b_enc: torch.Tensor
    W_dec: torch.Tensor
    k: int
    every: int


def _flat(dictionary: TopKDictionary, config: DictionaryConfig) -> tuple[_Level, dict[str, Any]]:
    """A dictionary as it is, or a tree's parents, and what is to be said of it."""
    if config.tree is None:
        return _Level(dictionary.W_enc, dictionary.b_enc, dictionary.W_dec, config.k, 1), {}
    size = config.tree.size
    W_enc, b_enc, W_dec = (each[::size].contiguous() for each in (dictionary.W_enc, dictionary.b_enc, dictionary.W_dec))
    said = {
        "kilobasis_level": "parents",
        "kilobasis_features": config.features,
        "kilobasis_note": f"feature i here is feature {size} i of a tree of {config.features}, whose children have no "
        "place in this layout",
    }
    return _Level(W_enc, b_enc, W_dec, config.tree.coarse_k, size), said
