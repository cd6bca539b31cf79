"""Dictionaries as they are made from their description, and as they lie in a committed train stage."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from pydantic import ValidationError
from safetensors import SafetensorError

from cluster.storage.objects import read_recorded
from cluster.storage.path import StoragePath
from pipeline.device import HOST
from pipeline.dictionary import pieces
from pipeline.dictionary.activation import kind
from pipeline.dictionary.model import DictionaryConfig, TopKDictionary
from pipeline.dictionary.tree import TreeDictionary
from pipeline.stage import Committed
from schemas.errors import IntegrityError
from schemas.layouts import DICTIONARY_CONFIG, dictionary_key, dictionary_keys
from schemas.records import ObjectEntry
from schemas.training import Sparsity


def empty(
    config: DictionaryConfig, features: int, sparsity: Sparsity | None = None, rows: torch.dtype = torch.float32
) -> TopKDictionary:
    """A dictionary of this description with all weights zero.

    Args:
        config: What it is.
        features: All of them, or a rank's.
        sparsity: The manifest's, where it is trained.
        rows: Type of encoder and decoder rows.
    """
    if config.tree is not None:
        return TreeDictionary(config.width, features, config.k, config.tree, rows)
    activation = kind(config.activation, config.k, sparsity)
    return TopKDictionary(config.width, features, activation, rows, config.target_width)


@dataclass(frozen=True, slots=True)
class Saved:
    """A dictionary as it lies in a committed stage."""

    dictionary: TopKDictionary
    config: DictionaryConfig


# Tensors with a row for every feature.
ROWS = ("W_enc", "W_dec", "b_enc", "threshold")


def files(dictionary: TopKDictionary) -> Iterator[tuple[str, bytes]]:
    """The tensors as safetensors, by key: one file, or several that follow each other where it is large."""
    tensors = {name: value.detach().contiguous() for name, value in dictionary.state_dict().items()}
    for piece in pieces.cut(tensors, ROWS.__contains__):
        yield dictionary_key(piece.index, piece.count), piece.body


def from_files(bodies: Iterable[bytes], config_body: bytes) -> Saved:
    """Read a dictionary back.

    Args:
        bodies: Its files, in order.
        config_body: What it is.

    Raises:
        IntegrityError: the files do not describe one dictionary.
    """
    try:
        config = DictionaryConfig.model_validate_json(config_body)
        tensors, there = pieces.join(bodies, ROWS.__contains__, 0, config.features)
        if there != config.features:
            raise RuntimeError(f"its files have {there} features, its description {config.features}")
        dictionary = empty(config, config.features)
        dictionary.load_state_dict(tensors)
    except (ValidationError, SafetensorError, RuntimeError) as error:
        raise IntegrityError(f"the dictionary cannot be read: {error}", "delete the train stage's folder") from error
    return Saved(dictionary.eval().requires_grad_(False), config)


def open_dictionary(train: Committed, device: torch.device = HOST) -> Saved:
    """The dictionary, checked against the stage's record; kept for the next call in this process.

    Args:
        train: The stage.
        device: Where its weights go.

    Raises:
        IntegrityError: it is absent or not what was committed.
    """
    keys = dictionary_keys(entry.key for entry in train.record.outputs.objects)
    return _open(train.path, tuple(map(train.entry, keys)), train.entry(DICTIONARY_CONFIG), device)


@functools.lru_cache(maxsize=2)
def _open(folder: StoragePath, weights: tuple[ObjectEntry, ...], config: ObjectEntry, device: torch.device) -> Saved:
    saved = from_files((read_recorded(folder, piece) for piece in weights), read_recorded(folder, config))
    saved.dictionary.to(device)
    return saved
