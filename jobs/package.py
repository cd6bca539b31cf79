"""What a job on a cluster starts with: our code, the manifest, and what that names beside itself."""

from __future__ import annotations

import glob
import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jobs.plan import size
from schemas.errors import ManifestError
from schemas.manifest import Manifest

PACKAGES = ("cluster", "jobs", "pipeline", "schemas")
# Where the manifest and what lies beside it is.
PLACE = "job"
MOST_BYTES, LARGEST = 50 * 2**20, 5
SKIPPED = {"__pycache__", ".git", "manifests"}


@dataclass(frozen=True, slots=True)
class Package:
    """A folder to start in. `overrides` are those that name what came along, where it is now."""

    folder: Path
    manifest: str
    digest: str
    overrides: tuple[str, ...]


def packed(manifest: Path, parsed: Manifest, folder: Path) -> Package:
    """Put a package together.

    Args:
        manifest: The YAML file.
        parsed: What it says.
        folder: Where to; empty.

    Raises:
        ManifestError: it is larger than what a cluster should be sent.
    """
    for package in PACKAGES:
        _copied(Path(__file__).parents[1] / package, folder / package)
    overrides = []
    for field, source in _sources(parsed):
        beside = _beside(manifest, source)
        if beside is None:
            continue
        for path in _named(source):
            _copied(path, folder / PLACE / path.relative_to(manifest.parent.resolve()))
        overrides.append(f"{field}=./{beside}")
    place = folder / PLACE
    place.mkdir(exist_ok=True)
    shutil.copyfile(manifest, place / manifest.name)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    _require_small(folder, files)
    made = hashlib.sha256()
    for path in files:
        body = path.read_bytes()
        made.update(f"{path.relative_to(folder)}\0{len(body)}\0".encode())
        made.update(body)
    return Package(folder, f"{PLACE}/{manifest.name}", made.hexdigest(), tuple(overrides))


def _sources(parsed: Manifest) -> Iterator[tuple[str, str]]:
    """Fields that may name files, and what they name."""
    if parsed.model is not None:
        yield "model.source", parsed.model.source
    if parsed.corpus is not None:
        yield "corpus.source", parsed.corpus.source


def _beside(manifest: Path, source: str) -> str | None:
    """A source by its place below the manifest's folder; None where it is elsewhere, or nothing here."""
    path = Path(source)
    if "://" in source or not path.is_absolute() or not _named(source):
        return None
    home = manifest.parent.resolve()
    return path.relative_to(home).as_posix() if path.is_relative_to(home) else None


def _named(source: str) -> list[Path]:
    # As the stages understand it: a pattern from the root of the file system on.
    return [Path(path) for path in sorted(glob.glob(source, recursive=True))]  # noqa: PTH207


def _copied(source: Path, target: Path) -> None:
    """Files and folders as they are, without what is made of them and without what leads elsewhere."""
    if source.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        return
    for path in sorted(source.iterdir()):
        if path.name not in SKIPPED and path.suffix != ".pyc" and not (path.is_symlink() and path.is_dir()):
            _copied(path, target / path.name)


def _require_small(folder: Path, files: list[Path]) -> None:
    sizes = {path: path.stat().st_size for path in files}
    total = sum(sizes.values())
    if total <= MOST_BYTES:
        return
    largest = sorted(files, key=lambda path: -sizes[path])[:LARGEST]
    named = ", ".join(f"{path.relative_to(folder)} ({size(sizes[path])})" for path in largest)
    raise ManifestError(
        f"what the job needs has {size(total)}, a cluster is sent {size(MOST_BYTES)} at most; largest: {named}",
        "put the model and the corpus where every machine of the cluster finds them, and name that place",
    )
