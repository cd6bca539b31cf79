"""What decides whether earlier output may be used again, and the words for what differs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.stage import Params, Stage
from schemas.records import canonical_json, sha256


def spec(stage: Stage, params: Params, inputs: Mapping[str, str]) -> dict[str, Any]:
    """Everything that identifies a stage's output: its version, its params, and its inputs' digests."""
    return {
        "stage": stage.name,
        "version": stage.version,
        "params": params.model_dump(mode="json"),
        "inputs": dict(inputs),
    }


def fingerprint(specification: Mapping[str, Any]) -> str:
    """sha256 of the canonical JSON."""
    return sha256(canonical_json(specification))


def differences(old: Any, new: Any, at: str = "") -> Iterator[str]:
    """`field: old -> new` for everything that differs.

    >>> list(differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "c": 2}))
    ['a.b: 1 -> 3']
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            yield from differences(old.get(key), new.get(key), f"{at}.{key}" if at else str(key))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (left, right) in enumerate(zip(old, new, strict=True)):
            yield from differences(left, right, f"{at}.{index}")
    elif old != new:
        yield f"{at}: {_short(old)} -> {_short(new)}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:18] + "..." + text[-18:]
