"""Learned features beside true ones, from weights alone: what decides which firings have to be counted.

Which feature is whose best is by |cosine|, as in SynthSAEBench (arXiv:2602.14687): a learned direction that points the
other way round counts. Cosines keep their signs. Dead features take part.

Shapes: F learned features, M true ones, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipeline.recovery.assignment import Pairs, assign
from pipeline.recovery.neighbours import unit
from pipeline.recovery.search import Searched, search_learned, search_true

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
    """Compare a dictionary with the true directions, all at once; see `pipeline.recovery.search` for what that costs.

    Args:
        W_dec_FD: Decoder rows. Lengths do not matter.
        true_MD: True directions.
        W_enc_FD: Encoder rows, for their duplicates.
        seed: Of what is approximate at large sizes.

    Raises:
        ValueError: there are no rows, or widths differ.
        NonFiniteError: a row is not finite.
    """
    learned = search_learned(W_dec_FD, true_MD, W_enc_FD, seed=seed)
    return matched(W_dec_FD, true_MD, learned, search_true(W_dec_FD, true_MD, seed=seed), seed)


def matched(W_dec_FD: torch.Tensor, true_MD: torch.Tensor, learned: Searched, true: Searched, seed: int = 0) -> Matches:
    """What the weights say, from what has been searched of all learned and of all true features.

    Args:
        W_dec_FD: Decoder rows, on the device that searches for what the one-to-one matching leaves over.
        true_MD: True directions, there as well.
        learned: Of `search_learned`, with the decoder's twins.
        true: Of `search_true`.
        seed: Of what is approximate at large sizes.
    """
    assert learned.decoder_twin is not None
    encoder = learned.encoder_twin
    return Matches(
        learned=_best(learned),
        true=_best(true),
        pairs=assign(unit(W_dec_FD), unit(true_MD), learned.either, true.either, seed),
        decoder_twins_F=learned.decoder_twin.cosines_QM[:, 0],
        encoder_twins_F=None if encoder is None else encoder.cosines_QM[:, 0],
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


def _best(found: Searched) -> Best:
    both = found.either
    return Best(both.indices_QM[:, 0], both.cosines_QM[:, 0], found.near.cosines_QM[:, 0])
