"""Reads a manifest: YAML, `--set` overrides and environment variables, into a frozen `Manifest`.

`${NAME}` and `${NAME:-default}` are expanded in `root`, `model.source` and `corpus.source`, nowhere else.
A relative source starts at the manifest's folder, a relative root at the working directory.
"""

from __future__ import annotations

import difflib
import functools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from cluster.storage.path import StoragePath
from cluster.storage.redaction import holds_credential
from schemas.errors import ManifestError
from schemas.manifest import Manifest

MAX_BYTES = 2**20
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key may stand only once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (str, int, float, bool)) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", key_node.start_mark)
            seen.add(key if isinstance(key, (str, int, float, bool)) else id(key_node))
        return super().construct_mapping(node, deep)


def load(path: Path, overrides: Sequence[str] = ()) -> Manifest:
    """Read and check a manifest.

    Args:
        path: The YAML file.
        overrides: `a.b=value` each; the value is YAML, list items are numbered from 0.

    Raises:
        ManifestError: the file is not there, is no YAML, or is no manifest. One line, naming the field.
    """
    tree = _parse(path)
    for override in overrides:
        _override(tree, override)
    if not isinstance(tree, dict):
        raise ManifestError(f"{path} holds {type(tree).__name__}, expected a mapping of sections", _SCHEMA)
    _expand(tree, path)
    try:
        return Manifest.model_validate(tree)
    except ValidationError as error:
        raise ManifestError(f"{path}: {_describe(error, tree)}", _SCHEMA) from error


def recorded(tree: Mapping[str, Any], root: str, overrides: Sequence[str], what: str) -> Manifest:
    """A manifest as a run has left it in its root.

    Args:
        tree: What was left.
        root: Where the root is now: other machines may have it under another name.
        overrides: See `load`.
        what: What it is, for a person.

    Raises:
        ManifestError: an override is wrong, or this version knows no such manifest.
    """
    copied = json.loads(json.dumps(tree))
    # The cluster of that run may be gone; which one to use now is said again.
    copied.get("compute", {}).pop("address", None)
    for override in overrides:
        if override.partition("=")[0] == "root":
            raise ManifestError(f"--set {override!r}: the root is {root}", "name the other root instead")
        _override(copied, override)
    copied["root"] = root
    _expand(copied, Path.cwd() / "manifest")
    try:
        return Manifest.model_validate(copied)
    except ValidationError as error:
        raise ManifestError(f"{what}: {_describe(error, copied)}", _SCHEMA) from error


_SCHEMA = "see `kilobasis schema` for every field"


def _parse(path: Path) -> Any:
    try:
        with path.open("rb") as stream:
            body = stream.read(MAX_BYTES + 1)
        text = body[:MAX_BYTES].decode("utf-8")
    except FileNotFoundError as error:
        raise ManifestError(f"manifest {path} does not exist", "check the path") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(
            f"manifest {path} cannot be read as text ({type(error).__name__})", "check the path"
        ) from error
    if len(body) > MAX_BYTES:
        raise ManifestError(f"{path} has more than {MAX_BYTES} bytes, the most of a manifest", "check the path")
    return _yaml(text, f"manifest {path}", "fix the line")


def _yaml(text: str, what: str, remedy: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except Exception as error:
        # Not only YAMLError: a tag such as !!bool or !!timestamp raises whatever its constructor stumbles over.
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or (str(error) or type(error).__name__).splitlines()[0]
        raise ManifestError(f"{what}{where} is not YAML: {str(problem)[:160]}", remedy) from error


def _override(tree: Any, override: str) -> None:
    dotted, equals, text = override.partition("=")
    keys = dotted.split(".")
    if not equals or not all(keys):
        raise ManifestError(
            f"--set {override!r} is not of the form a.b=value", "write for example --set compute.workers=4"
        )
    value = _yaml(text, f"--set {dotted}: the value", "quote it")
    at = tree
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(at, list):
            if key not in map(str, range(len(at))):
                raise ManifestError(
                    f"--set {override!r}: {'.'.join(keys[:depth])} has {len(at)} items, numbered from 0, not {key!r}",
                    "number an item",
                )
            index: Any = int(key)
        elif isinstance(at, dict):
            index = key
            if not last and at.get(key) is None:
                at[key] = {}
        else:
            raise ManifestError(f"--set {override!r}: {'.'.join(keys[:depth])} is no section", _SCHEMA)
        if last:
            at[index] = value
        else:
            at = at[index]


def _expand(tree: dict[str, Any], path: Path) -> None:
    for keys in (("root",), ("model", "source"), ("corpus", "source")):
        section: Any = tree
        for key in keys[:-1]:
            section = section.get(key)
            if not isinstance(section, dict):
                section = {}
        value = section.get(keys[-1])
        if not isinstance(value, str):
            continue
        field = ".".join(keys)
        expanded = _VARIABLE.sub(functools.partial(_variable, field), value)
        if holds_credential(expanded):
            raise ManifestError(
                f"{field} holds a credential, and manifests are stored with every run",
                "leave it out; credentials come from the provider's own chain (environment, profile, role)",
            )
        if "${" in expanded:
            raise ManifestError(f"{field} {expanded!r} has no valid variable", "write ${NAME} or ${NAME:-default}")
        try:
            section[keys[-1]] = _placed(expanded, keys, path)
        except (OSError, ValueError, RuntimeError) as error:
            if isinstance(error, ManifestError):
                raise
            raise ManifestError(f"{field} {expanded[:200]!r} is no path ({error})", "correct the path") from error


def _variable(field: str, match: re.Match[str]) -> str:
    found = os.environ.get(match[1], match[2])
    if found is None:
        raise ManifestError(f"{field} uses ${{{match[1]}}}, which is not set", f"export {match[1]}=...")
    return found


def _placed(value: str, keys: tuple[str, ...], path: Path) -> str:
    if not value.strip():
        raise ValueError("it is empty")
    if "\0" in value:
        raise ValueError("it has a null character")
    base = Path.cwd() if keys == ("root",) else path.resolve().parent
    if keys == ("model", "source"):
        # Otherwise it is a name on the hub.
        local = base / Path(value).expanduser()
        return os.path.normpath(local.absolute()) if value.startswith((".", "/", "~")) or local.is_dir() else value
    return str(StoragePath.parse(value, base))


def _describe(error: ValidationError, tree: Any) -> str:
    found = error.errors()
    # A list whose item is wrong is reported as too short as well.
    found = [each for each in found if not any(_within(other["loc"], each["loc"]) for other in found)]
    # An unknown key comes first: it is often what a missing one was meant to be.
    found.sort(key=lambda each: each["type"] != "extra_forbidden")
    first = found[0]
    field = ".".join(str(part) for part in first["loc"])
    rest = f" ({len(found) - 1} more)" if len(found) > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _fields(first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        return f"{field}: unknown key; {hint}{rest}"
    if first["type"] == "missing":
        return f"{field}: this field is required{rest}"
    message = first["msg"].removeprefix("Value error, ").replace("tuple", "list").replace("Tuple", "List")
    if first["type"] == "model_type":
        message = "expected a mapping of fields"
    shown = "" if first["type"] == "value_error" else f", found {_shown(first.get('input'))}"
    return f"{field + ': ' if field else ''}{message}{shown}{rest}"


def _within(inner: tuple[int | str, ...], outer: tuple[int | str, ...]) -> bool:
    return len(inner) > len(outer) and inner[: len(outer)] == outer


def _shown(given: Any) -> str:
    if isinstance(given, (dict, list)):
        return f"a {'mapping' if isinstance(given, dict) else 'list'} of {len(given)}"
    if isinstance(given, int) and given.bit_length() > 128:
        return f"a number of {given.bit_length()} bits"
    return repr(str(given)[:60])


def _fields(location: tuple[int | str, ...]) -> list[str]:
    """Names that may stand at a place of the manifest."""
    at: type[BaseModel] = Manifest
    beside: list[type[BaseModel]] = []
    for part in location:
        if isinstance(part, int) or part not in at.model_fields:
            # Of several kinds of section, a part of the location says which one it is.
            at = next((kind for kind in beside if part in get_args(kind.model_fields["kind"].annotation)), at)
            continue
        inner = list(_sections(at.model_fields[part].annotation))
        beside = [kind for kind in inner if "kind" in kind.model_fields]
        at = next(iter(inner), at)
    return sorted(at.model_fields)


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that an annotation names, wherever in it."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections(inner)


def canonical(manifest: Manifest) -> Mapping[str, Any]:
    """The manifest as plain values."""
    return manifest.model_dump(mode="json")
