"""Ways in which a committed object can go bad, and how a run reads everything that it committed."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from pathlib import Path

from cluster.storage.objects import read_recorded
from cluster.storage.path import StoragePath
from jobs import inventory
from jobs import manifest as manifests
from jobs import plan as planning
from jobs.fingerprint import spec
from jobs.log import SlotLog, TrainingLog
from jobs.mesh import resolved
from jobs.sources import survey
from jobs.state import StageFolder
from jobs.workspace import Workspace
from pipeline.activations.source import open_store
from pipeline.sources.sequences import pieces, read
from pipeline.stage import Committed, Sources
from schemas.errors import IntegrityError, ManifestError
from schemas.manifest import Manifest

# What lies where, by the pattern of its path below a root. Every kind of committed object has one.
KINDS = {
    "root record": "ROOT.json",
    "specification": "*/*/SPEC.json",
    "unit record": "**/units/*.json",
    "stage record": "**/COMMITTED.json",
    "slot of a training log": "dictionaries/*/train/*/log/*.json",
    "lease": "harvest/*/log/*.json",
    "checkpoint": "**/checkpoints/*/state.safetensors",
    "tokens": "tokenize/*/*/*.parquet",
    "index of tokens": "tokenize/*/index.parquet",
    "shard": "harvest/*/activations.zarr/*/c/**/*",
    "array description": "harvest/*/activations.zarr/**/zarr.json",
    "list of objects": "harvest/*/*.parquet",
    "dictionary": "dictionaries/*/train/*/dictionary.*",
    "curves": "dictionaries/*/train/*/curves.parquet",
    "metrics": "dictionaries/*/evaluate/*/*.json",
    "catalog": "dictionaries/*/catalog/*/*.*",
    "export": "dictionaries/*/export/*/saelens/*",
}


def candidates(root: Path, kind: str) -> list[Path]:
    """The objects of a kind. Superseded checkpoints count no longer, and heartbeats never did."""
    live = {
        entry.key
        for label, path in inventory.folders(StoragePath.parse(root))
        for kind_, _, entry in inventory.take(label, path, full=False).entries
        if kind_ is inventory.Kind.CHECKPOINT
    }
    found = [path for path in sorted(root.glob(KINDS[kind])) if path.is_file() and "beats" not in path.parts]
    if kind == "checkpoint":
        found = [path for path in found if "/".join(path.parts[-3:]) in live]
    if kind in ("metrics", "catalog"):
        found = [path for path in found if path.name not in ("SPEC.json", "COMMITTED.json")]
    return found


def flip(path: Path, rng: random.Random, _others: list[Path]) -> None:
    """One bit."""
    body = bytearray(path.read_bytes())
    body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(body))


def truncate(path: Path, rng: random.Random, _others: list[Path]) -> None:
    """The end is missing."""
    body = path.read_bytes()
    path.write_bytes(body[: rng.randrange(1, len(body))])


def empty(path: Path, _rng: random.Random, _others: list[Path]) -> None:
    """No byte is left."""
    path.write_bytes(b"")


def delete(path: Path, _rng: random.Random, _others: list[Path]) -> None:
    """Gone."""
    path.unlink()


def swap(path: Path, rng: random.Random, others: list[Path]) -> None:
    """Contents exchanged with another object of the kind; with its own reverse where there is no other."""
    body = path.read_bytes()
    different = [other for other in others if other.read_bytes() != body]
    if different:
        other = rng.choice(different)
        path.write_bytes(other.read_bytes())
        other.write_bytes(body)
    else:
        path.write_bytes(body[::-1])


def stale(path: Path, rng: random.Random, others: list[Path]) -> None:
    """The content of another object of the kind, or an older one of its own size."""
    body = path.read_bytes()
    different = [other.read_bytes() for other in others if other.read_bytes() != body]
    path.write_bytes(rng.choice(different) if different else bytes(len(body)))


MUTATIONS: dict[str, Callable[[Path, random.Random, list[Path]], None]] = {
    "flip": flip,
    "truncate": truncate,
    "empty": empty,
    "delete": delete,
    "swap": swap,
    "stale": stale,
}


# Whole folders, as a lifecycle rule or a slip of the hand takes them.
PREFIXES = (
    "tokenize/*",
    "harvest/*",
    "harvest",
    "dictionaries/*/train/*",
    "dictionaries/*/evaluate",
    "dictionaries/*/catalog/*",
    "dictionaries/*/export/*",
    "dictionaries",
)


def read_everything(manifest: Path, root: Path) -> None:
    """Read what was committed as runs and stages do, by their own code.

    Raises:
        IntegrityError: something is absent or damaged.
    """
    parsed, sources = _surveyed(manifest)
    parsed = parsed.model_copy(update={"root": str(root)})
    try:
        planned = planning.make(parsed, Workspace.of(parsed, writable=False), sources)
    except ManifestError as error:
        raise IntegrityError(error.what) from error
    for each in planned.stages:
        folder = each.folder
        committed = folder.committed() if folder else None
        if folder is None or committed is None:
            raise IntegrityError(f"{each.label} is not committed")
        if missing := folder.missing(committed):
            raise IntegrityError(f"{folder.path} lacks {missing}")
        folder.claim(spec(each.stage, each.params, committed.record.inputs))
        _read_stage(each.label, folder, committed)


@functools.cache
def _surveyed(manifest: Path) -> tuple[Manifest, Sources]:
    parsed = manifests.load(manifest, [])
    sources = survey(parsed)
    return resolved(parsed, sources), sources


def _read_stage(label: str, folder: StageFolder, committed: Committed) -> None:
    for unit in folder.units():
        record = folder.unit(unit)
        if committed.record.units[unit] != record.digest:
            raise IntegrityError(f"{folder.path} unit {unit} is not the one that was committed")
        if label != "harvest":
            for entry in record.made.objects:
                read_recorded(folder.path, entry)
    for entry in committed.record.outputs.objects:
        read_recorded(folder.path, entry)
    log = SlotLog(folder.path)
    log.refresh()
    for checkpoint in log.checkpoints:
        for entry in checkpoint.objects:
            TrainingLog(folder.path).read(entry)
    if label == "tokenize":
        for split in ("train", "heldout"):
            every = pieces(committed, split)
            read(folder.path, every, 0, sum(piece.rows for piece in every))
    if label == "harvest":
        store = open_store(committed)
        for hook_point in store.layout.widths:
            for slab in range(store.layout.geometry.slabs):
                store.slab(hook_point, slab)
