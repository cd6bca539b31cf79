"""A code turned over for the catalog: when and how strongly each feature fired. Entries (E) that fired, by feature."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

STATISTICS = pa.schema(
    [
        ("feature", pa.int64()),
        ("fires", pa.int64()),
        ("sum", pa.float64()),
        ("square", pa.float64()),
        ("max", pa.float32()),
    ]
)


def by_feature(
    z_NK: npt.NDArray[np.float32], indices_NK: npt.NDArray[np.int64], features: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The code's entries that fired, sorted by feature and in corpus order below that.

    Returns:
        Flat positions of the entries in the code, and where each feature's begin. Shapes (E,), (F + 1,).
    """
    flat = indices_NK.reshape(-1)
    fired = np.flatnonzero(z_NK.reshape(-1) > 0)
    order_E = fired[np.argsort(flat[fired], kind="stable")]
    starts_F = np.zeros(features + 1, np.int64)
    np.cumsum(np.bincount(flat[fired], minlength=features), out=starts_F[1:])
    return order_E, starts_F


def statistics(values_E: npt.NDArray[np.float32], starts_F: npt.NDArray[np.int64]) -> pa.Table:
    """Sums per feature; only features that fired."""
    counts_F = np.diff(starts_F)
    fired = np.flatnonzero(counts_F)
    at = starts_F[fired]
    values = values_E.astype(np.float64)
    return pa.Table.from_pydict(
        {
            "feature": fired,
            "fires": counts_F[fired],
            "sum": np.add.reduceat(values, at) if len(at) else np.zeros(0),
            "square": np.add.reduceat(values**2, at) if len(at) else np.zeros(0),
            "max": np.maximum.reduceat(values_E, at) if len(at) else np.zeros(0, np.float32),
        },
        STATISTICS,
    )
