"""Opens the dictionary that a train stage committed."""

from __future__ import annotations

import functools

from cluster.storage.objects import read_recorded
from cluster.storage.path import StoragePath
from pipeline.dictionary.model import Saved, from_bytes
from pipeline.stage import Committed
from schemas.layouts import DICTIONARY, DICTIONARY_CONFIG
from schemas.records import ObjectEntry


def open_dictionary(train: Committed) -> Saved:
    """The dictionary, checked against the stage's record; kept for the next call in this process.

    Raises:
        IntegrityError: it is absent or not what was committed.
    """
    return _open(train.path, train.entry(DICTIONARY), train.entry(DICTIONARY_CONFIG))


@functools.lru_cache(maxsize=2)
def _open(folder: StoragePath, weights: ObjectEntry, config: ObjectEntry) -> Saved:
    return from_bytes(read_recorded(folder, weights), read_recorded(folder, config))
