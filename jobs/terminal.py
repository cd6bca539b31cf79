"""What commands share: their usual arguments, and how they print."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs import manifest as manifests
from schemas.errors import ManifestError, printable

if TYPE_CHECKING:
    from cluster.storage.path import StoragePath
    from schemas.manifest import Manifest

ManifestPath = Annotated[Path, typer.Argument(metavar="MANIFEST", help="The YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a field; may be given several times.")
]
Target = Annotated[str, typer.Argument(metavar="MANIFEST|ROOT", help="The YAML file, or a root's folder or URL.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def count(number: int, what: str) -> str:
    """So many of something."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def span(seconds: float) -> str:
    """A time as people say it.

    >>> span(42.4), span(125), span(7384), span(200_000)
    ('42 s', '2 min 5 s', '2 h 3 min', '2 d 7 h')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def root_of(target: str, overrides: list[str] | None) -> StoragePath:
    """The root that a manifest names, or the root itself."""
    from cluster.storage.path import StoragePath

    if _is_manifest(target):
        return StoragePath.parse(manifests.load(Path(target), overrides or []).root)
    if overrides:
        raise ManifestError(f"--set was given, but {target} is no manifest", "name the manifest instead of its root")
    return StoragePath.parse(target)


def _is_manifest(target: str) -> bool:
    # These say no where a path cannot be one; a pipe is a manifest too.
    return target.endswith((".yaml", ".yml")) or (os.path.exists(target) and not os.path.isdir(target))  # noqa: PTH110, PTH112


def manifest_of(target: str, overrides: list[str] | None) -> Manifest:
    """The manifest that a file holds, or that of the newest run of a root."""
    if _is_manifest(target):
        return manifests.load(Path(target), overrides or [])
    from cluster.storage.path import StoragePath
    from jobs.workspace import last_manifest, reaching, require_root

    root = StoragePath.parse(target)
    with reaching(f"root {root}", root):
        require_root(root)
        found = last_manifest(root)
    if found is None:
        raise ManifestError(f"root {root} has no run to resume", "start one with `kilobasis run`")
    # A root is asked about all of it, whatever its newest run left to others.
    found = found | {"compute": {key: value for key, value in found.get("compute", {}).items() if key != "only"}}
    return manifests.recorded(found, str(root), overrides or [], f"the manifest of the last run in {root}")


def quiet() -> None:
    """Keep libraries from talking over our own lines."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Must be set before the first BLAS call of a process that wants the same bits every time.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def console() -> Console:
    """Wide where nobody looks on, so that a pipe or a log gets whole words."""
    made = Console(soft_wrap=True)
    return made if made.is_terminal else Console(soft_wrap=True, width=max(200, made.width))


def table(title: str) -> Table:
    """An empty one."""
    return Table(title=text(title), title_justify="left")


def text(words: str) -> Text:
    """What is printed as it is, whoever wrote it: nothing in it is markup, or drives the terminal."""
    return Text(printable(words))


def say(where: Console, line: str) -> None:
    """Print a line."""
    where.print(text(line), highlight=False)
