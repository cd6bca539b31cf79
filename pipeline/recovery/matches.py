"""Learned features beside true ones, from weights alone: what decides which firings have to be counted.

Which feature is whose best is by |cosine|, as in SynthSAEBench (arXiv:2602.14687): a learned direction that points the
other way round counts. Cosines keep their signs. Dead features take part.

Shapes: F learned features, M true ones, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipeline.recovery.assignment import Pairs, assign
from pipeline.recovery.neighbours import Neighbours, either, neighbours, opposites, unit
from schemas.errors import NonFiniteError

# Neighbours of each side that take part in a large one-to-one matching.
CANDIDATES = 8
# A learned feature stands for its best true one from this |cosine| on: of two orthogonal features that were learned as
# one direction (0.71 each) it then stands for the nearer, and what is there by chance (0.2 among 10^6 directions of
# width 768) stands for nothing.
STANDS_FOR = 0.5
# No tree of true features is deeper.
DEEPEST = 64


@dataclass(frozen=True, slots=True)
class Best:
    """For each of N features the other side's best.

    `indices_N` and `cosines_N` are of the largest |cosine| (of equals the lower index), `signed_N` is the largest
    cosine.
    """

    indices_N: torch.Tensor
    cosines_N: torch.Tensor
    signed_N: torch.Tensor


@dataclass(frozen=True, slots=True)
class Matches:
    """What the weights say.

    `learned` has the best true feature of every learned one (F), `true` the best learned one of every true one (M),
    `pairs` the one-to-one matching, learned first. `decoder_twins_F` and `encoder_twins_F` are the largest cosine of a
    row with another row of the same matrix.
    """

    learned: Best
    true: Best
    pairs: Pairs
    decoder_twins_F: torch.Tensor
    encoder_twins_F: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Links:
    """What somebody who counts firings has to know of the matches.

    Attributes:
        true_F: Best true feature of every learned one, int64.
        learned_M: Best learned feature of every true one, int64.
        stands_F: Whether the learned feature stands for it: |cosine| of at least 0.5.
        parents_M: Parent of every true feature, -1 at a root, int64; None where there is no hierarchy.
    """

    true_F: torch.Tensor
    learned_M: torch.Tensor
    stands_F: torch.Tensor
    parents_M: torch.Tensor | None = None


def match(
    W_dec_FD: torch.Tensor, true_MD: torch.Tensor, W_enc_FD: torch.Tensor | None = None, seed: int = 0
) -> Matches:
    """Compare a dictionary with the true directions. Lengths of rows do not matter.

    Costs two searches of each side in the other, near rows and opposite ones, and one of each of the dictionary's
    matrices in itself: six at the most, of which `neighbours` says what one takes. At 10^6 by 10^6 rows of width 768
    17 GiB, the arguments' own 9 GiB included.

    Args:
        W_dec_FD: Decoder rows.
        true_MD: True directions.
        W_enc_FD: Encoder rows, for their duplicates.
        seed: Of what is approximate at large sizes.

    Raises:
        ValueError: there are no rows, or widths differ.
        NonFiniteError: a row is not finite.
    """
    learned_FD, true_MD = (_parsed(name, rows) for name, rows in (("W_dec", W_dec_FD), ("true directions", true_MD)))
    if learned_FD.shape[1] != true_MD.shape[1]:
        raise ValueError(
            f"W_dec has width {learned_FD.shape[1]}, the true directions {true_MD.shape[1]} -> compare a dictionary "
            "with the world whose hook point it explains"
        )
    near_F, either_F = _found(learned_FD, true_MD, seed)
    near_M, either_M = _found(true_MD, learned_FD, seed)
    return Matches(
        learned=_best(near_F, either_F),
        true=_best(near_M, either_M),
        pairs=assign(learned_FD, true_MD, either_F, either_M, seed),
        decoder_twins_F=twins(learned_FD, seed),
        encoder_twins_F=None if W_enc_FD is None else twins(_parsed("W_enc", W_enc_FD), seed),
    )


def links(matches: Matches, parents_M: torch.Tensor | None = None) -> Links:
    """What to count by.

    Args:
        matches: From `match`.
        parents_M: Parent of every true feature, -1 at a root.

    Raises:
        ValueError: a parent is no true feature, or a feature is among its own ancestors.
    """
    count = len(matches.true.indices_N)
    if parents_M is not None:
        parents_M = parents_M.long()
        if len(parents_M) != count or not bool(((parents_M >= -1) & (parents_M < count)).all()):
            raise ValueError(
                f"{len(parents_M)} parents from {int(parents_M.min())} to {int(parents_M.max())}, expected {count} "
                f"from -1 to {count - 1} -> give one parent for each true feature, -1 at a root"
            )
        above_M = parents_M
        for _ in range(DEEPEST):
            above_M = torch.where(above_M >= 0, parents_M[above_M], -1)
        if bool((above_M >= 0).any()):
            raise ValueError(
                f"true feature {int((above_M >= 0).nonzero()[0])} has more than {DEEPEST} ancestors, or is one of its "
                "own -> give the parents of a tree"
            )
    return Links(
        true_F=matches.learned.indices_N,
        learned_M=matches.true.indices_N,
        stands_F=matches.learned.cosines_N.abs() >= STANDS_FOR,
        parents_M=parents_M,
    )


def twins(rows_FD: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Of every unit row the largest cosine with another one of the same matrix; -1 where there is no other. (F,).

    >>> twins(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])).tolist()
    [1.0, 1.0, 0.0]
    """
    found = neighbours(rows_FD, rows_FD, 2, seed)
    others_F2 = found.indices_QM != torch.arange(len(rows_FD), device=rows_FD.device)[:, None]
    return found.cosines_QM.where(others_F2, -1.0).max(1).values


def _parsed(name: str, rows_ND: torch.Tensor) -> torch.Tensor:
    if rows_ND.ndim != 2 or not rows_ND.numel():
        raise ValueError(f"{name} has shape {tuple(rows_ND.shape)}, expected rows by width -> give at least one row")
    bad = int((~rows_ND.isfinite().all(1)).sum())
    if bad:
        raise NonFiniteError(f"{bad} of {len(rows_ND)} rows of {name} are not finite", "train again from a checkpoint")
    return unit(rows_ND)


def _found(queries_ND: torch.Tensor, rows_RD: torch.Tensor, seed: int) -> tuple[Neighbours, Neighbours]:
    near = neighbours(queries_ND, rows_RD, CANDIDATES, seed)
    return near, either(near, opposites(queries_ND, rows_RD, CANDIDATES, seed))


def _best(near: Neighbours, both: Neighbours) -> Best:
    return Best(both.indices_QM[:, 0], both.cosines_QM[:, 0], near.cosines_QM[:, 0])
