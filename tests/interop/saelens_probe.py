"""Loads folders with the real SAELens, and encodes and decodes: `saelens_probe.py FOLDER OUT [FOLDER OUT ...]`.

Standalone, because it runs in the peers' environment. OUT holds `x.npy` (B, D) and gets `features.npy`
(B, F), `reconstruction.npy` (B, D) and `facts.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch


def probe(folder: Path, out: Path) -> None:
    """Load, encode, decode, and write down what came out."""
    # Here, so that whoever collects doctests can import this file without SAELens.
    import sae_lens  # type: ignore[import-not-found]

    autoencoder = sae_lens.SAE.load_from_disk(str(folder), device="cpu")
    with torch.no_grad():
        features_BF = autoencoder.encode(torch.from_numpy(np.load(out / "x.npy")))
        reconstruction_BD = autoencoder.decode(features_BF)
    np.save(out / "features.npy", features_BF.numpy())
    np.save(out / "reconstruction.npy", reconstruction_BD.numpy())
    facts = {
        "version": sae_lens.__version__,
        "class": type(autoencoder).__name__,
        "k": getattr(autoencoder.cfg, "k", None),
        "dtype": str(autoencoder.W_enc.dtype),
        "metadata": autoencoder.cfg.metadata.to_dict(),
    }
    (out / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    for folder, out in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        probe(Path(folder), Path(out))
