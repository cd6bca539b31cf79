"""Pictures of pages that draw with the report's own plotting library, in a headless chromium (make browser)."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

VENDOR = Path(__file__).parents[1] / "pipeline" / "report" / "vendor"
LIBRARIES = {"D3": "d3-*.min.js", "PLOT": "plot-*.min.js"}


def take(page: str, picture: Path, width: int, height: int) -> None:
    """Take a picture of a page.

    Args:
        page: HTML. Its `<script>D3</script>` and `<script>PLOT</script>` become the libraries.
        picture: A PNG, written anew.
        width: Of the page, in pixels.
        height: The same.
    """
    for name, library in LIBRARIES.items():
        (path,) = VENDOR.glob(library)
        page = page.replace(f"<script>{name}<", f"<script>{path.read_text()}<")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "page.html"
        file.write_text(page)
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=20000"]
        flags += [f"--user-data-dir={folder}/profile", f"--window-size={width},{height}", f"--screenshot={picture}"]
        subprocess.run(["chromium", *flags, file.as_uri()], check=True, capture_output=True, timeout=120)
