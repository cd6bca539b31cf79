"""Judges dictionaries with SAELens' own functions for synthetic data: `synthsaebench_probe.py CASES OUT`.

Standalone, because it runs in the peers' environment. CASES (npz) has of every case `<case>.W_dec` (F, D),
`<case>.true` (M, D), `<case>.latents` (N, F) and `<case>.active` (N, M); OUT gets the numbers by case, as JSON.
"""

from __future__ import annotations

import importlib
import json
import sys
import types
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch


def probe(cases: Path, out: Path) -> None:
    """Judge each case, firings in two batches."""
    # Here, so that whoever collects doctests can import this file without SAELens.
    import sae_lens  # type: ignore[import-not-found]

    # The package's own first lines bring its plots, and plotly with them.
    package = types.ModuleType("sae_lens.synthetic")
    package.__path__ = [str(Path(sae_lens.__file__).parent / "synthetic")]
    sys.modules[package.__name__] = package
    evals = importlib.import_module("sae_lens.synthetic.evals")

    arrays = np.load(cases)
    judged = {}
    for case in sorted({name.split(".")[0] for name in arrays}):
        W_dec, true, latents, active = (
            torch.from_numpy(arrays[f"{case}.{part}"]) for part in ("W_dec", "true", "latents", "active")
        )
        calculator = evals.ClassificationMetricsCalculator(W_dec, true)
        for batch in torch.arange(len(latents)).chunk(2):
            calculator.add_batch(latents[batch], active[batch])
        made = asdict(calculator.compute())
        judged[case] = {
            "mcc": evals.mean_correlation_coefficient(W_dec, true),
            "uniqueness": evals.feature_uniqueness(W_dec, true),
            "precision": made["precision"],
            "recall": made["recall"],
            "f1": made["f1_score"],
            "accuracy": made["accuracy"],
        }
    out.write_text(json.dumps(judged))


if __name__ == "__main__":
    probe(Path(sys.argv[1]), Path(sys.argv[2]))
