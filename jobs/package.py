"""What a job on a cluster starts with: our code, the manifest, and what that names beside itself."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.storage import foreign
from cluster.storage.path import StoragePath
from schemas.errors import ManifestError
from schemas.manifest import Manifest
from schemas.quantities import size

PACKAGES = ("cluster", "jobs", "pipeline", "schemas")
# Where the manifest and what lies beside it is.
PLACE = "job"
MOST_BYTES, LARGEST = 50 * 2**20, 5
# Nothing of `deploy` runs in a job: who changes it does not change the job.
SKIPPED = {"__pycache__", ".git", "manifests", "deploy"}


@dataclass(frozen=True, slots=True)
class Package:
    """A folder to start in. `sources` are the manifest's fields that name files, as they are named from there."""

    folder: Path
    manifest: str
    digest: str
    sources: Mapping[str, str]


def packed(manifest: Path, parsed: Manifest, folder: Path) -> Package:
    """Put a package together.

    Args:
        manifest: The YAML file.
        parsed: What it says.
        folder: Where to; empty.

    Raises:
        ManifestError: it is larger than what a cluster should be sent, or something of it cannot be read.
    """
    home = Path(__file__).parents[1]
    files = {f"{package}/{inner}": path for package in PACKAGES for inner, path in _code(home / package)}
    files[f"{PLACE}/{manifest.name}"] = manifest
    sources = {}
    for field, source in _sources(parsed):
        beside = _beside(manifest, source)
        sources[field] = source if beside is None else f"./{beside}"
        if beside is not None:
            files |= {f"{PLACE}/{inner}": path for inner, path in _named(manifest.parent.resolve(), field, source)}
    try:
        _require_small(files)
        made = hashlib.sha256()
        for name, path in sorted(files.items()):
            body = path.read_bytes()
            made.update(f"{name}\0{len(body)}\0".encode())
            made.update(body)
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(body)
    except (OSError, UnicodeError) as error:
        raise ManifestError(
            f"what the job needs cannot be read ({type(error).__name__}: {error})",
            "move it out of the folder of the manifest, or make it readable",
        ) from error
    return Package(folder, f"{PLACE}/{manifest.name}", made.hexdigest(), sources)


def _sources(parsed: Manifest) -> Iterator[tuple[str, str]]:
    """Fields that may name files, and what they name."""
    if parsed.model is not None:
        yield "model.source", parsed.model.source
    if parsed.corpus is not None:
        yield "corpus.source", parsed.corpus.source


def _beside(manifest: Path, source: str) -> str | None:
    """A source by its place below the manifest's folder; None where it is elsewhere, or nothing here."""
    path, home = Path(source), manifest.parent.resolve()
    if "://" in source or not path.is_absolute() or not path.is_relative_to(home):
        return None
    return path.relative_to(home).as_posix()


def _named(home: Path, field: str, source: str) -> Iterator[tuple[str, Path]]:
    """Files that a source names. Of a corpus it may be a pattern, as its stage understands it."""
    one = field == "model.source" or Path(source).exists()
    for path in [Path(source)] if one else [each.local for each in foreign.glob(StoragePath.parse(source))]:
        for inner in [path] if path.is_file() else sorted(path.rglob("*")):
            # Ray's packages leave out what these name.
            if inner.is_file() and inner.name not in (".gitignore", ".rayignore"):
                yield inner.relative_to(home).as_posix(), inner


def _code(package: Path) -> Iterator[tuple[str, Path]]:
    """Our files, without what is made of them and without the manifests that come with us."""
    for path in sorted(package.rglob("*")):
        inner = path.relative_to(package)
        if path.is_file() and path.suffix != ".pyc" and not SKIPPED.intersection(inner.parts):
            yield inner.as_posix(), path


def _require_small(files: Mapping[str, Path]) -> None:
    sizes = {name: path.stat().st_size for name, path in files.items()}
    total = sum(sizes.values())
    if total <= MOST_BYTES:
        return
    largest = sorted(sizes, key=lambda name: -sizes[name])[:LARGEST]
    named = ", ".join(f"{name} ({size(sizes[name])})" for name in largest)
    raise ManifestError(
        f"what the job needs has {size(total)}, a cluster is sent {size(MOST_BYTES)} at most; largest: {named}",
        "put the model and the corpus where every machine of the cluster finds them, and name that place",
    )
