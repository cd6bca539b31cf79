"""Which learned feature resembles which known one: the part of recover that searches, and that identify reads as well.

A unit is a span of the features of one side, which look for their nearest on the other; one more unit makes pairs of
what all have found. On a GPU, where there is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import safetensors.torch
from pydantic import BaseModel, ConfigDict

from cluster.pool import Resources
from cluster.storage.create import create_or_adopt
from cluster.storage.formats import read_tensors
from cluster.storage.parsing import parsing
from cluster.storage.path import StoragePath
from pipeline.device import device
from pipeline.dictionary.stored import open_dictionary
from pipeline.recovery import kept
from pipeline.recovery.matches import Matches, matched
from pipeline.recovery.search import CANDIDATES, SPAN, Searched, joined, search_learned, search_true
from pipeline.stage import Committed, Out, Task
from pipeline.truth import open_truth, section_of
from schemas.records import ObjectEntry, Unit

MATCHED = "matches.safetensors"
# Of a feature: two lists of neighbours, its twins, and its match.
FEATURE_BYTES = CANDIDATES * 24 + 88


class Counterparts(BaseModel):
    """Where it is written what all features found; empty where no known feature has a direction."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    learned: tuple[ObjectEntry, ...]
    true: tuple[ObjectEntry, ...]
    matches: ObjectEntry | None


class SearchTask(Task):
    """Look for what is nearest to features of one side."""

    side: Literal["learned", "true"]
    first: int
    end: int
    harvest: Committed
    train: Committed
    hook_point: str
    seed: int
    gpus: float


class MatchTask(Task):
    """Match the dictionary's directions with the true ones, by what each has found."""

    harvest: Committed
    train: Committed
    hook_point: str
    seed: int
    gpus: float
    learned: tuple[ObjectEntry, ...]
    true: tuple[ObjectEntry, ...]


def units(features: int, known: int) -> int:
    """How many units `counterparts` makes."""
    return len(_spans(features)) + len(_spans(known)) + 1


def counterparts(
    harvest: Committed, train: Committed, hook_point: str, features: int, seed: int, out: Out
) -> Counterparts:
    """Let every feature search, and match them."""
    resources = Resources(threads=out.compute.threads, gpus=out.compute.gpus)
    sides: dict[Literal["learned", "true"], int] = {"learned": features, "true": section_of(harvest).features}
    tasks = [
        SearchTask(
            unit=f"{side}-{index:06d}",
            side=side,
            first=first,
            end=end,
            harvest=harvest,
            train=train,
            hook_point=hook_point,
            seed=seed,
            gpus=out.compute.gpus,
        )
        for side, count in sides.items()
        for index, (first, end) in enumerate(_spans(count))
    ]
    records = out.map(search_features, tasks, resources)
    learned, true = (
        tuple(entry for task in tasks if task.side == side for entry in records[task.unit].made.objects)
        for side in sides
    )
    matching = MatchTask(
        unit="matches",
        harvest=harvest,
        train=train,
        hook_point=hook_point,
        seed=seed,
        gpus=out.compute.gpus,
        learned=learned,
        true=true,
    )
    objects = out.map(match_features, [matching], resources)["matches"].made.objects
    return Counterparts(learned=learned, true=true, matches=next(iter(objects), None))


def _spans(count: int) -> list[tuple[int, int]]:
    return [(first, min(first + SPAN, count)) for first in range(0, count, SPAN)]


def search_features(task: SearchTask, path: StoragePath) -> Unit:
    """What a span of one side finds. Known features without a direction are left out, so a last span may be empty."""
    dictionary, truth = open_dictionary(task.train).dictionary, open_truth(task.harvest, task.hook_point)
    known_RD, W_dec_FD = truth.directions_MD[truth.represented_M], dictionary.W_dec.detach()
    if not len(known_RD):
        return Unit(objects=())
    span, where = slice(task.first, task.end), device(task.gpus)
    if task.side == "learned":
        found = search_learned(W_dec_FD, known_RD, dictionary.W_enc.detach(), span, task.seed, where)
    else:
        found = search_true(W_dec_FD, known_RD, span, task.seed, where)
    key, body = f"searched/{task.unit}.safetensors", safetensors.torch.save(kept.found(found))
    create_or_adopt(path / key, body)
    return Unit(objects=(ObjectEntry.of(key, body),))


def match_features(task: MatchTask, path: StoragePath) -> Unit:
    """Whose best is whose, and who goes with whom."""
    if not task.learned:
        return Unit(objects=())
    truth, where = open_truth(task.harvest, task.hook_point), device(task.gpus)
    known_RD = truth.directions_MD[truth.represented_M].to(where)
    W_dec_FD = open_dictionary(task.train).dictionary.W_dec.detach().to(where)
    found = matched(W_dec_FD, known_RD, searched(task.learned, path), searched(task.true, path), task.seed)
    body = safetensors.torch.save(kept.tensors(found))
    create_or_adopt(path / MATCHED, body)
    return Unit(objects=(ObjectEntry.of(MATCHED, body),))


def searched(entries: Sequence[ObjectEntry], path: StoragePath) -> Searched:
    """What all features of one side have found.

    Raises:
        IntegrityError: an object is not what was committed.
    """
    parts = []
    for entry in entries:
        with parsing(path / entry.key, "neighbours"):
            parts.append(kept.searched_of(read_tensors(path, entry)))
    return joined(parts)


def matches(entry: ObjectEntry, path: StoragePath) -> Matches:
    """What was matched.

    Raises:
        IntegrityError: the object is not what was committed.
    """
    with parsing(path / entry.key, "matches"):
        return kept.matches_of(read_tensors(path, entry))
