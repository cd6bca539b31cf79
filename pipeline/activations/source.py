"""Opens what a harvest committed."""

from __future__ import annotations

from cluster.storage.formats import read_table
from cluster.storage.parsing import parsing
from pipeline.activations.layout import StoreLayout
from pipeline.activations.read import ActivationStore
from pipeline.stage import Committed
from schemas.layouts import STORE_HASHES, STORE_OBJECTS
from schemas.records import ObjectEntry
from schemas.tables import STORE_HASHES as SUMS


def open_store(harvest: Committed) -> ActivationStore:
    """The store of a committed harvest; only objects that its records name can be read through it.

    Raises:
        IntegrityError: the list of objects is not what was committed.
    """
    listing = read_table(harvest.path, harvest.entry(STORE_OBJECTS))
    with parsing(harvest.path / STORE_OBJECTS, "list of objects"):
        entries = [ObjectEntry(**row) for row in listing.to_pylist()]
    hashed = read_table(harvest.path, harvest.entry(STORE_HASHES), SUMS)
    sums = {(row["hook_point"], row["unit"]): row["sums"] for row in hashed.to_pylist()}
    with parsing(harvest.path, "harvest"):
        layout = StoreLayout.model_validate(harvest.facts["layout"])
    return ActivationStore(harvest.path, layout, entries, sums)
