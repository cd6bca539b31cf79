"""Which rows of one matrix point the way that a row of another one does: the search under every recovery metric.

Small searches are exact. Beyond what two cores compute in minutes the search is over codes of 512 bits: a row's signs
along random directions (Charikar 2002), of which two rows at angle t agree in 1 - t / pi. A linear scan of these codes
makes a short list, and only that is scored in float32. Why not an inverted file, or a graph: true directions of a world
are nearly orthogonal, so they have no clusters to go by. Measured at 100,000 random rows of width 768, whether the one
row at cosine 0.9, 0.7, 0.5 of a query is found: bits 1.0, 1.0, 1.0; an inverted file of 1,024 lists, 64 of them read,
1.0, 0.995, 0.90, at four times the scan's cost.

Cost of 10^6 queries in 10^6 rows of width 768 on two cores: 10^12 pairs. By bits 3.6 x 10^8 pairs a second on each core
(AVX-512): 25 minutes, and 2 more for scoring 64 x 10^6 pairs. Exact where the machine multiplies bfloat16 matrices:
4 to 5 x 10^8, 17 to 21 minutes, so there it stays exact; in float32 0.9 x 10^8, an hour and a half. Memory: both
matrices, one negated copy for `opposites`, 64 MB of codes and 100 MB of results: 9 GiB at the most.

Shapes: Q queries, R rows, D width, M neighbours of each query, S entries of the short list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipeline.dictionary.kernels import native
from pipeline.dictionary.kernels.native_search import searches_in_half
from pipeline.dictionary.topk import kernels, top_k

# Multiplications of an exact search: about five minutes on two cores in float32, half an hour in bfloat16.
EXACT, EXACT_IN_HALF = 2**45, 2**50
BITS = 512
SHORT_LIST = 64
# Queries whose codes, short lists and scores are in memory at once.
BLOCK = 16_384
LEAST_NORM = 1e-8


@dataclass(frozen=True, slots=True)
class Neighbours:
    """For every query its M best rows, best first, and their cosines. int64 and float32, (Q, M)."""

    indices_QM: torch.Tensor
    cosines_QM: torch.Tensor


def unit(rows_RD: torch.Tensor) -> torch.Tensor:
    """Rows at length 1, float32; a row shorter than 1e-8 stays short, so all its cosines are (nearly) 0.

    >>> unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    rows_RD = rows_RD.float()
    norm_R: torch.Tensor = torch.linalg.vector_norm(rows_RD, dim=1, keepdim=True)
    return rows_RD / norm_R.clamp_min(LEAST_NORM)


def neighbours(
    queries_QD: torch.Tensor, rows_RD: torch.Tensor, count: int, seed: int = 0, of: int | None = None
) -> Neighbours:
    """The `count` rows with the largest inner products, exact or approximate by what the exact search would cost.

    Args:
        queries_QD: Unit rows, float32.
        rows_RD: Unit rows, float32.
        count: Neighbours wanted; as many as there are rows, if those are fewer.
        seed: Of the approximate search's random directions.
        of: How many queries these are some of; all are searched the same way.
    """
    if not len(queries_QD):
        nothing_QM = queries_QD.new_zeros((0, min(count, len(rows_RD))))
        return Neighbours(nothing_QM.long(), nothing_QM)
    multiplications = (of or len(queries_QD)) * len(rows_RD) * rows_RD.shape[1]
    if rows_RD.is_cuda or multiplications <= (EXACT_IN_HALF if _fast_in_half(rows_RD) else EXACT):
        return exact(queries_QD, rows_RD, count)
    return approximate(queries_QD, rows_RD, count, seed)


def _fast_in_half(rows_RD: torch.Tensor) -> bool:
    return native.fits(rows_RD) and searches_in_half()


def opposites(
    queries_QD: torch.Tensor, rows_RD: torch.Tensor, count: int, seed: int = 0, of: int | None = None
) -> Neighbours:
    """The `count` rows with the most negative inner products, most negative first. See `neighbours`.

    >>> opposites(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8], [-1.0, 0.0]]), 1).cosines_QM.tolist()
    [[-1.0]]
    """
    found = neighbours(-queries_QD, rows_RD, count, seed, of)
    return Neighbours(found.indices_QM, -found.cosines_QM)


def either(near: Neighbours, far: Neighbours) -> Neighbours:
    """The rows with the largest |inner product|, from what `neighbours` and `opposites` found of the same rows.

    Cosines keep their signs.

    >>> rows = torch.tensor([[0.6, 0.8], [-0.8, 0.6], [0.0, 1.0]])
    >>> query = torch.tensor([[1.0, 0.0]])
    >>> either(neighbours(query, rows, 2), opposites(query, rows, 2)).indices_QM.tolist()
    [[1, 0]]
    """
    indices_QN = torch.cat([near.indices_QM, far.indices_QM], 1)
    cosines_QN = torch.cat([near.cosines_QM, far.cosines_QM], 1)
    # Where rows are few a row is in both lists: it counts in that of its sign.
    own_QN = torch.cat([near.cosines_QM >= 0, far.cosines_QM < 0], 1)
    order_QN = torch.argsort(cosines_QN.abs().where(own_QN, -1.0), dim=1, descending=True, stable=True)
    order_QM = order_QN[:, : near.indices_QM.shape[1]]
    return Neighbours(indices_QN.gather(1, order_QM), cosines_QN.gather(1, order_QM))


def exact(queries_QD: torch.Tensor, rows_RD: torch.Tensor, count: int) -> Neighbours:
    """The true neighbours, by the search that encodes tokens: Q R D multiplications, a block of scores in memory.

    Of rows whose cosines are equal to 2^-22 the lower index may come first.

    >>> exact(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8], [0.8, 0.6], [-1.0, 0.0]]), 2).indices_QM.tolist()
    [[1, 0]]
    """
    # Encoding rectifies. A bias of 2 keeps every score, at least -1, above that.
    bias_R = rows_RD.new_full((len(rows_RD),), 2.0)
    parts = []
    for part_QD in torch.split(queries_QD, BLOCK):
        _, indices_QM = top_k(part_QD, rows_RD, bias_R, min(count, len(rows_RD)))
        parts.append(_scored(part_QD, rows_RD, indices_QM, count))
    return together(parts)


def approximate(queries_QD: torch.Tensor, rows_RD: torch.Tensor, count: int, seed: int = 0) -> Neighbours:
    """What 512 bits of each row say are its neighbours, the best 64 or more of them scored in float32.

    A row whose cosine stands out by more than about 0.3 from all but 63 others is practically always found; where
    nothing stands out, what is found may be a little worse than the best. Cosines are those of the rows named. The same
    seed gives the same result on the same machine.
    """
    # Brought in by who needs it: few searches are so large.
    import faiss

    if rows_RD.is_cuda:
        raise ValueError(
            "rows on a GPU, expected on the CPU, where faiss-cpu scans -> call exact: a GPU is fast enough"
        )
    directions_DN = torch.randn(rows_RD.shape[1], BITS, generator=torch.Generator().manual_seed(seed))
    index = faiss.IndexBinaryFlat(BITS)
    for part_RD in torch.split(rows_RD, BLOCK):
        index.add(_packed_signs(part_RD @ directions_DN).numpy())
    listed = min(max(SHORT_LIST, 4 * count), len(rows_RD))
    parts = []
    for part_QD in torch.split(queries_QD, BLOCK):
        _, indices_QS = index.search(_packed_signs(part_QD @ directions_DN).numpy(), listed)
        parts.append(_scored(part_QD, rows_RD, torch.from_numpy(indices_QS), count))
    return together(parts)


def _packed_signs(values_RN: torch.Tensor) -> torch.Tensor:
    """Eight signs to a byte."""
    weights_8 = 2 ** torch.arange(8, dtype=torch.uint8)
    return ((values_RN > 0).view(len(values_RN), -1, 8) * weights_8).sum(2, dtype=torch.uint8)


def _scored(queries_QD: torch.Tensor, rows_RD: torch.Tensor, indices_QS: torch.Tensor, count: int) -> Neighbours:
    """The best of a short list, by inner products in float32; of equals the lower index."""
    indices_QS = indices_QS.sort(1).values
    ones_QS = torch.ones(indices_QS.shape, dtype=torch.float32, device=queries_QD.device)
    cosines_QS = kernels(rows_RD, ones_QS, queries_QD).inner(queries_QD, ones_QS, indices_QS, rows_RD)
    order_QM = torch.argsort(cosines_QS, dim=1, descending=True, stable=True)[:, :count]
    return Neighbours(indices_QS.gather(1, order_QM), cosines_QS.gather(1, order_QM))


def together(parts: Sequence[Neighbours]) -> Neighbours:
    """What parts of the queries found, as one; in the order of the parts."""
    return Neighbours(torch.cat([part.indices_QM for part in parts]), torch.cat([part.cosines_QM for part in parts]))
