"""Opens what a harvest committed."""

from __future__ import annotations

import io

import pyarrow.parquet as pq

from cluster.storage.objects import read_recorded
from pipeline.activations.layout import StoreLayout
from pipeline.activations.read import ActivationStore
from pipeline.stage import Committed
from schemas.layouts import STORE_HASHES, STORE_OBJECTS
from schemas.records import ObjectEntry


def open_store(harvest: Committed) -> ActivationStore:
    """The store of a committed harvest; only objects that its records name can be read through it.

    Raises:
        IntegrityError: the list of objects is not what was committed.
    """
    listing = pq.read_table(io.BytesIO(read_recorded(harvest.path, harvest.entry(STORE_OBJECTS))))
    entries = [ObjectEntry(**row) for row in listing.to_pylist()]
    hashed = pq.read_table(io.BytesIO(read_recorded(harvest.path, harvest.entry(STORE_HASHES))))
    sums = {(row["hook_point"], row["unit"]): row["sums"] for row in hashed.to_pylist()}
    return ActivationStore(harvest.path, StoreLayout.model_validate(harvest.facts["layout"]), entries, sums)
