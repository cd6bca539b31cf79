"""What is known of a synthetic harvest's features, and how well a dictionary's match them.

`recovery` is the one place where a dictionary is held against the truth. It gets decoder rows, true directions, and a
`Tally` that was shown every held-out batch: the dictionary's code (z_NK, indices_NK) and the true one, compressed by
row. The measure is MMCS, the mean of maximal cosine similarities (Sharkey et al. 2022, "Taking features out of
superposition with sparse autoencoders"), both ways, exactly where that can be paid (see `neighbours`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import normalize

from cluster.storage.formats import read_tensors
from cluster.storage.parsing import parsing
from cluster.storage.path import StoragePath
from pipeline.recovery.neighbours import Neighbours, neighbours
from pipeline.recovery.scores import mmcs
from pipeline.recovery.search import Searched
from pipeline.stage import Committed
from pipeline.synthetic.features import parents
from pipeline.synthetic.rows import Active, Source
from pipeline.synthetic.source import of_identity, open_directions, open_source
from schemas.layouts import FIRES
from schemas.records import ObjectEntry
from schemas.synthetic import Toy, World

# A toy model's feature with a shorter column has no direction: it was not worth one. Lengths lie near 0 or near 1.
REPRESENTED_NORM = 0.5
# A true feature is found if a feature of the dictionary is so near.
FOUND = 0.9
# Rows of each side that speak for all of a baseline's: the mean of so many cosines is sure to three digits.
SAMPLE = 65_536


@dataclass(frozen=True, slots=True)
class Truth:
    """The known features (M) of a hook point.

    Attributes:
        directions_MD: Unit vectors; of a feature that is not represented, of no meaning.
        norm_M: What each adds to a row at 1. 1 in a world.
        represented_M: Which have a direction at all.
        parent_M: The feature above each, or -1.
        fires_M: How often each fired in the training split.
    """

    directions_MD: torch.Tensor
    norm_M: torch.Tensor
    represented_M: torch.Tensor
    parent_M: torch.Tensor
    fires_M: torch.Tensor

    def __len__(self) -> int:
        return len(self.norm_M)


def open_truth(harvest: Committed, hook_point: str) -> Truth:
    """What is known of a committed synthetic harvest's hook point.

    Raises:
        IntegrityError: the harvest's record or objects are not what was committed.
    """
    section, entry = section_of(harvest), _entry(harvest, hook_point)
    fires_M = read_tensors(harvest.path, harvest.entry(FIRES))[hook_point]
    hierarchy = section.hierarchy if isinstance(section, World) else None
    directions_MD, norm_M = _unit_directions(section, harvest.path, entry)
    represented_M = norm_M >= (REPRESENTED_NORM if isinstance(section, Toy) else 0.0)
    parent_M = torch.from_numpy(parents(hierarchy, len(norm_M)))
    return Truth(directions_MD, norm_M, represented_M, parent_M, fires_M)


def open_rows(harvest: Committed, hook_point: str) -> Source:
    """The rows of a committed synthetic harvest's hook point, and any others by the same law.

    Raises:
        IntegrityError: see `open_truth`.
    """
    return open_source(section_of(harvest), hook_point, harvest.path, _entry(harvest, hook_point))


@dataclass(frozen=True, slots=True)
class Represented:
    """The known features that have a direction (R of them), as recovery is judged by them.

    Attributes:
        known_R: Which ones.
        place_M: The place of every known feature among them, or -1.
        directions_RD: Unit vectors.
        parents_R: The place of the feature above each, or -1; None where there is no hierarchy.
        fires_R: How often each fired in the training split.
    """

    known_R: torch.Tensor
    place_M: torch.Tensor
    directions_RD: torch.Tensor
    parents_R: torch.Tensor | None
    fires_R: torch.Tensor

    def active(self, active: Active) -> tuple[torch.Tensor, torch.Tensor]:
        """Where each row's active ones begin, and where the last one's end; and their places. Shapes (N + 1,), (E,)."""
        place_E = self.place_M[torch.from_numpy(active.feature_E)]
        kept_E = place_E >= 0
        before_E = torch.cat([torch.zeros(1, dtype=torch.int64), kept_E.long().cumsum(0)])
        return before_E[torch.from_numpy(active.start_N1)], place_E[kept_E]


def represented(truth: Truth) -> Represented | None:
    """What recovery is judged by; None where no known feature has a direction."""
    known_R = torch.nonzero(truth.represented_M).squeeze(1)
    if not len(known_R):
        return None
    place_M = torch.full((len(truth),), -1)
    place_M[known_R] = torch.arange(len(known_R))
    above_R = truth.parent_M[known_R]
    parents_R = place_M[above_R.clamp_min(0)].where(above_R >= 0, -1)
    has_tree = bool((parents_R >= 0).any())
    return Represented(
        known_R, place_M, truth.directions_MD[known_R], parents_R if has_tree else None, truth.fires_M[known_R]
    )


def section_of(harvest: Committed) -> World | Toy:
    """The source that a harvest was made from.

    Raises:
        IntegrityError: the harvest's record does not say.
    """
    with parsing(harvest.path, "synthetic harvest"):
        return of_identity(harvest.facts["source"])


def _entry(harvest: Committed, hook_point: str) -> ObjectEntry | None:
    with parsing(harvest.path, "synthetic harvest"):
        found = harvest.facts["kept"].get(hook_point)
        return None if found is None else ObjectEntry.model_validate(found)


@functools.lru_cache(maxsize=1)
def _unit_directions(
    section: World | Toy, folder: StoragePath, entry: ObjectEntry | None
) -> tuple[torch.Tensor, torch.Tensor]:
    directions_MD = open_directions(section, folder, entry)
    return normalize(directions_MD, dim=1), directions_MD.norm(dim=1)


class Tally:
    """What fired on held-out rows, counted batch by batch. Tallies of several workers add up.

    Args:
        features: F.
        known: M.
    """

    def __init__(self, features: int, known: int) -> None:
        self.rows = 0
        self.fires_F = torch.zeros(features, dtype=torch.int64)
        self.known_fires_M = torch.zeros(known, dtype=torch.int64)

    def add(self, z_NK: torch.Tensor, indices_NK: torch.Tensor, active: Active) -> None:
        """A batch: the dictionary's code of some rows, and the true one."""
        self.rows += len(active)
        self.fires_F += torch.bincount(indices_NK[z_NK > 0], minlength=len(self.fires_F))
        self.known_fires_M += torch.bincount(torch.from_numpy(active.feature_E), minlength=len(self.known_fires_M))

    def merge(self, other: Tally) -> None:
        """Another worker's rows as well."""
        self.rows += other.rows
        self.fires_F += other.fires_F
        self.known_fires_M += other.known_fires_M


@dataclass(frozen=True, slots=True)
class Recovery:
    """How well a dictionary's features match the known ones.

    Attributes:
        metrics: Numbers for `metrics.json`.
        nearest_M: For every known feature the nearest feature that fired, -1 if there is none.
        cosine_M: The cosine with it; 0 if there is none.
    """

    metrics: dict[str, Any]
    nearest_M: torch.Tensor
    cosine_M: torch.Tensor


def recovery(
    W_dec_FD: torch.Tensor, truth: Truth, tally: Tally, searched: tuple[Searched, Searched] | None = None
) -> Recovery:
    """Hold a dictionary against the truth.

    `mmcs_found` is the mean over represented known features of the largest cosine with a feature that fired on held-out
    rows, `mmcs_true` the mean over features that fired of the largest cosine with a represented known one, `found` the
    share of represented known features whose largest cosine is at least 0.9.

    >>> truth = Truth(torch.eye(2), torch.ones(2), torch.ones(2) > 0, torch.tensor([-1, -1]), torch.tensor([5, 5]))
    >>> tally = Tally(2, 2)
    >>> tally.fires_F += torch.tensor([3, 0])
    >>> found = recovery(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), truth, tally)
    >>> found.metrics["mmcs_found"], found.metrics["mmcs_true"], found.metrics["found"], found.nearest_M.tolist()
    (0.5, 1.0, 0.5, [0, 0])

    Args:
        W_dec_FD: Decoder rows.
        truth: Of the hook point that they explain.
        tally: What fired.
        searched: What all learned features have found among the represented known ones, and the other way round:
            then only those are searched for again whose neighbours are all dead.
    """
    alive_A = torch.nonzero(tally.fires_F).squeeze(1)
    known_R = torch.nonzero(truth.represented_M).squeeze(1)
    nearest_M = torch.full((len(truth),), -1)
    cosine_M = torch.zeros(len(truth))
    metrics: dict[str, Any] = {
        "known": len(truth),
        "represented": len(known_R),
        "known_l0": float(tally.known_fires_M.sum()) / max(tally.rows, 1),
    }
    if len(alive_A) and len(known_R):
        alive_AD = normalize(W_dec_FD[alive_A].float(), dim=1)
        if searched is None:
            cosine_A = neighbours(alive_AD, truth.directions_MD[known_R], 1).cosines_QM[:, 0]
        else:
            cosine_A = searched[0].near.cosines_QM[alive_A, 0]
            nearest_M[known_R], cosine_M[known_R] = _first_alive(searched[1].near, tally.fires_F > 0)
        lacking_L = torch.nonzero(nearest_M < 0).squeeze(1)
        if len(lacking_L):
            found = neighbours(truth.directions_MD[lacking_L], alive_AD, 1)
            nearest_M[lacking_L], cosine_M[lacking_L] = alive_A[found.indices_QM[:, 0]], found.cosines_QM[:, 0]
        metrics |= _resemblance(cosine_M[known_R], cosine_A)
    return Recovery(metrics, nearest_M, cosine_M)


def resemblance(W_dec_FD: torch.Tensor, truth: Truth, most: int = SAMPLE) -> dict[str, float]:
    """`mmcs_found`, `mmcs_true` and `found` of rows that nobody has learned, all of which count as alive.

    Args:
        W_dec_FD: Rows.
        truth: What they are held against; empty-handed where nothing is represented.
        most: So many rows of each side look at all of the other's: what is the mean of very many needs no more.
    """
    known_RD, rows_FD = truth.directions_MD[truth.represented_M], normalize(W_dec_FD.float(), dim=1)
    if not len(known_RD):
        return {}
    known_SD, rows_SD = (side[:: -(-len(side) // most)] for side in (known_RD, rows_FD))
    return _resemblance(
        neighbours(known_SD, rows_FD, 1).cosines_QM[:, 0], neighbours(rows_SD, known_RD, 1).cosines_QM[:, 0]
    )


def _resemblance(cosine_R: torch.Tensor, cosine_A: torch.Tensor) -> dict[str, float]:
    return {
        "mmcs_found": mmcs(cosine_R),
        "mmcs_true": mmcs(cosine_A),
        "found": float((cosine_R >= FOUND).double().mean()),
    }


def _first_alive(near: Neighbours, alive_F: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest that is alive, or -1, and its cosine, or 0. Shapes (R,), (R,)."""
    alive_RC = alive_F[near.indices_QM]
    at_R1 = alive_RC.to(torch.uint8).argmax(1, keepdim=True)
    none_R = ~alive_RC.any(1)
    nearest_R, cosine_R = (each_RC.gather(1, at_R1)[:, 0] for each_RC in (near.indices_QM, near.cosines_QM))
    return nearest_R.masked_fill(none_R, -1), cosine_R.masked_fill(none_R, 0.0)
