"""Activations as files that contenders of any environment read: .npy of rows of bfloat16, as int16 of the same bits.

bfloat16 because that is what the quickstart's store holds: nothing is lost, and nobody gets more than the others.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import synthetic
import torch
from contenders import ROOT
from synthetic import GroundTruth
from trainings import Files

from jobs import manifest as manifests
from jobs import plan as planning
from jobs.runner import run
from jobs.sources import survey
from pipeline.activations.read import Cursor, Stream
from pipeline.activations.source import open_store
from pipeline.sources import models
from pipeline.sources.hooks import capture
from pipeline.sources.sequences import batches, overlapping, padded, pieces, read
from pipeline.stage import Committed, Stage
from pipeline.stages import STAGES
from schemas.manifest import Dictionary, Manifest
from schemas.manifest import Model as ModelPlace
from schemas.training import Filter

QUICKSTART = ROOT / "jobs" / "manifests" / "quickstart.yaml"
BATCH = 4096


@dataclass(frozen=True)
class Harvested:
    """A manifest whose tokenize and harvest stages are committed."""

    manifest: Manifest
    place: ModelPlace
    tokens: Committed
    harvest: Committed


def harvested(overrides: Iterable[str] = ()) -> Harvested:
    """The quickstart's committed harvest. What of it is not committed yet is run.

    Args:
        overrides: As those of `kilobasis run --set`.
    """
    root = [] if "KILOBASIS_ROOT" in os.environ else [f"root={ROOT / 'runs' / 'quickstart'}"]
    # The pool changes no bit of what is harvested; inline starts no Ray.
    manifest = manifests.load(QUICKSTART, [*root, "compute.pool=inline", *overrides])
    with mock.patch.object(planning, "instances", _shared):
        done = run(manifest)
    return Harvested(manifest, survey(manifest).model.place, done["tokenize"], done["harvest"])


def _shared(_manifest: Manifest) -> list[tuple[Stage, Dictionary | None]]:
    """`planning.instances`, but for the stages of single dictionaries."""
    return [(stage, None) for stage in STAGES if not stage.per_dictionary]


def stream_digest(source: Harvested, hook_point: str, rows: int, seed: int, heldout: int) -> str:
    """Which data `stream_files` makes of these arguments."""
    parts = (source.harvest.record.digest, source.tokens.record.digest, hook_point, rows, seed, heldout)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def stream_files(source: Harvested, hook_point: str, rows: int, seed: int, heldout: int, folder: Path) -> Files:
    """The training stream of a hook point as the train stage would read it, and rows of held-out documents.

    Args:
        source: The harvest.
        hook_point: Of the model.
        rows: Length of the stream; epochs follow each other.
        seed: Of its order.
        heldout: Most held-out rows.
        folder: Where the files go; those that are there are used.
    """
    digest = stream_digest(source, hook_point, rows, seed, heldout)
    passing = source.manifest.dictionaries[0].train.filter
    data, judged = folder / f"{digest}-stream.npy", folder / f"{digest}-heldout.npy"
    if not data.exists():
        width = open_store(source.harvest).layout.widths[hook_point]
        write(data, _streamed(source, hook_point, rows, seed, passing), rows, width)
    if not judged.exists():
        x_ND = _heldout(source, hook_point, heldout, passing)
        write(judged, [x_ND], len(x_ND), x_ND.shape[1])
    return Files(data, judged, digest)


def _streamed(source: Harvested, hook_point: str, rows: int, seed: int, passing: Filter) -> Iterable[torch.Tensor]:
    expected = int(source.harvest.facts["hashes"][hook_point], 16)
    stream = Stream(open_store(source.harvest), (hook_point,), seed, BATCH, passing, expected)
    with closing(stream.batches(Cursor())) as read_out:
        for x_BD, _ in itertools.islice(read_out, -(-rows // BATCH)):
            yield x_BD


def _heldout(source: Harvested, hook_point: str, rows: int, passing: Filter) -> torch.Tensor:
    """Activations of held-out documents, in the store's type. Shape (N, D)."""
    end = min(rows, source.tokens.facts["heldout_rows"])
    loaded = models.load(source.place).model
    sequences = read(source.tokens.path, overlapping(pieces(source.tokens, "heldout"), 0, end), 0, end)
    found = []
    with torch.inference_mode():
        for batch in batches(sequences, source.manifest.harvest.batch_tokens):
            x_BSD = capture(loaded, [hook_point], padded(batch), stop_at=hook_point)[hook_point]
            found += [x_BSD[index, passing.skip_positions : len(each)] for index, each in enumerate(batch)]
    return torch.cat(found).bfloat16()


def truth_files(truth: GroundTruth, rows: int, seed: int, heldout: int, folder: Path) -> Files:
    """Synthetic activations, fresh ones in every batch, and their true directions.

    Args:
        truth: What they are made of.
        rows: Of the stream.
        seed: Of its tokens; the held-out ones have another.
        heldout: Held-out rows.
        folder: Where the files go; those that are there are used.
    """
    digest = truth_digest(truth, rows, seed, heldout)
    data, judged = folder / f"{digest}-stream.npy", folder / f"{digest}-heldout.npy"
    directions = folder / f"{digest}-directions.npy"
    for path, count, of in ((data, rows, (seed, 0)), (judged, heldout, (seed, 1))):
        if not path.exists():
            seeds = np.random.SeedSequence(of).generate_state(-(-count // BATCH))
            made = (torch.from_numpy(truth.sample(1, BATCH, int(each))[0]).bfloat16() for each in seeds)
            write(path, made, count, truth.width)
    np.save(directions, truth.vectors())
    return Files(data, judged, digest, directions)


def truth_digest(truth: GroundTruth, rows: int, seed: int, heldout: int) -> str:
    """Which data `truth_files` makes of these arguments."""
    # The code as well: other data must not pass for these.
    parts = (truth, rows, seed, heldout, Path(synthetic.__file__).read_text())
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def write(path: Path, parts: Iterable[torch.Tensor], rows: int, width: int) -> None:
    """Write the first rows of bfloat16 parts; the file has its name only once it is whole."""
    unfinished = path.with_suffix(".unfinished")
    out_ND = np.lib.format.open_memmap(unfinished, "w+", np.int16, (rows, width))
    first = 0
    for x_BD in parts:
        some_BD = x_BD[: rows - first].contiguous().view(torch.int16).numpy()
        out_ND[first : first + len(some_BD)] = some_BD
        first += len(some_BD)
    assert first == rows, f"{path.name} has {first} rows, expected {rows}"
    out_ND.flush()
    unfinished.rename(path)
