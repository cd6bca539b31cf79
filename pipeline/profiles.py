"""What is said of every feature of any dictionary: when it fires, and what its weights are."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from cluster.storage.formats import read_table
from cluster.storage.path import StoragePath
from pipeline.dictionary.model import TopKDictionary
from pipeline.dictionary.weights import nearest
from schemas.records import Unit
from schemas.tables import FEATURE_STATISTICS

ENCODE_ROWS = 4096
NORM_BINS = 40


def spread(units: int, unit_rows: int, tokens: int) -> list[int]:
    """As many units as the tokens allow, evenly spread over the corpus."""
    wanted = max(1, min(units, tokens // unit_rows))
    return sorted({int(index * units / wanted) for index in range(wanted)})


def encode_rows(
    dictionary: TopKDictionary, x_ND: torch.Tensor
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """The code of many rows. Shapes (N, K), (N, K)."""
    where = dictionary.b_dec.device
    parts = [dictionary.encode(x_BD.to(where).float()) for x_BD in torch.split(x_ND, ENCODE_ROWS)]
    z_NK, indices_NK = (torch.cat([part[at] for part in parts]) for at in (0, 1))
    return z_NK.cpu().numpy(), indices_NK.cpu().numpy()


def norm_counts(norms_N: torch.Tensor) -> dict[str, Any]:
    """L2 norms of rows as counts on a fine logarithmic grid, which add up over units."""
    counts, edges = np.histogram(norms_N.log10().clamp(-3.0, 6.0).numpy(), bins=900, range=(-3.0, 6.0))
    return {"first": float(edges[0]), "step": 0.01, "counts": counts.tolist()}


def weights_table(
    dictionary: TopKDictionary,
    promoted: list[list[int]],
    suppressed: list[list[int]],
    near: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> pa.Table:
    """Norms, nearest neighbours, and the output tokens that a feature promotes, one row a feature.

    Args:
        dictionary: Whose features.
        promoted: Output tokens of each.
        suppressed: Output tokens of each.
        near: What `nearest` gives, where somebody has searched already.
    """
    W_enc_FD, W_dec_FD = dictionary.W_enc, dictionary.W_dec
    neighbour_F, cosine_F = near or nearest(torch.nn.functional.normalize(W_dec_FD, dim=1))
    return pa.Table.from_pydict(
        {
            "decoder_norm": W_dec_FD.norm(dim=1).cpu().numpy(),
            "encoder_norm": W_enc_FD.norm(dim=1).cpu().numpy(),
            "encoder_decoder_cosine": pa.array(_cosine(dictionary), pa.float32()),
            "nearest_feature": neighbour_F.cpu().numpy(),
            "nearest_cosine": cosine_F.cpu().numpy(),
            "top_tokens": promoted,
            "bottom_tokens": suppressed,
        }
    )


def _cosine(dictionary: TopKDictionary) -> list[float | None]:
    """Of encoder and decoder rows; a transcoder's lie in two spaces."""
    if dictionary.b_in is not None:
        return [None] * dictionary.features
    cosine_F: list[float | None] = torch.nn.functional.cosine_similarity(dictionary.W_enc, dictionary.W_dec).tolist()
    return cosine_F


def feature_table(path: StoragePath, collected: list[Unit], weights: Unit, tokens: int) -> pa.Table:
    """One row per feature, from the sums of all units and the weights."""
    described = read_table(path, weights.objects[0])
    count = described.num_rows
    fires, total, square = np.zeros(count, np.int64), np.zeros(count), np.zeros(count)
    largest = np.zeros(count, np.float32)
    for unit in collected:
        table = read_table(path, unit.objects[0])
        at = table["feature"].to_numpy()
        fires[at] += table["fires"].to_numpy()
        total[at] += table["sum"].to_numpy()
        square[at] += table["square"].to_numpy()
        largest[at] = np.maximum(largest[at], table["max"].to_numpy())
    seen = np.maximum(fires, 1)
    mean = total / seen
    columns = {
        "feature": np.arange(count),
        "fires": fires,
        "density": fires / max(tokens, 1),
        "mean": mean,
        "std": np.sqrt(np.maximum(square / seen - mean**2, 0.0)),
        "max": largest,
        **{name: described[name] for name in described.column_names},
    }
    return pa.Table.from_pydict({field.name: columns[field.name] for field in FEATURE_STATISTICS}).cast(
        FEATURE_STATISTICS
    )


def norm_histogram(collected: list[Unit]) -> dict[str, list[float]]:
    """The rows' norms as a histogram over the range that they really span."""
    counts = np.sum([unit.facts["norms"]["counts"] for unit in collected], axis=0)
    first, step = collected[0].facts["norms"]["first"], collected[0].facts["norms"]["step"]
    at = np.flatnonzero(counts)
    low, high = int(at[0]), int(at[-1]) + 1
    width = max(1, -(-(high - low) // NORM_BINS))
    starts = np.arange(low, high, width)
    edges = [10 ** (first + step * float(edge)) for edge in [*starts, starts[-1] + width]]
    return {
        "edges": [float(f"{edge:.6g}") for edge in edges],
        "counts": [int(counts[start : start + width].sum()) for start in starts],
    }


def densest(features: pa.Table, count: int) -> pa.Table:
    """The features that fire most, where there are more than so many."""
    if features.num_rows <= count:
        return features
    return features.sort_by([("fires", "descending"), ("feature", "ascending")]).slice(0, count)
