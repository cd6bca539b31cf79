"""A dictionary of a manifest that stands for several: every combination of some of its fields' values."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

MOST = 1024
SWEEP_SCHEMA = {"anyOf": [{"type": "object", "additionalProperties": {"type": "array"}}, {"type": "null"}]}


def expanded(dictionaries: Any) -> Any:
    """The list of dictionaries with a dictionary for each combination in place of each that has a `sweep`.

    Their names say what is theirs. What is no list of mappings is left as it is, for whoever checks it.

    >>> [each["name"] for each in expanded([{"name": "a", "sweep": {"k": [16, 32], "train.seed": [0, 1]}}])]
    ['a-k16-seed0', 'a-k16-seed1', 'a-k32-seed0', 'a-k32-seed1']

    Raises:
        ValueError: a sweep is not one, or would be too many dictionaries.
    """
    if not isinstance(dictionaries, list | tuple):
        return dictionaries
    made: list[Any] = []
    for index, each in enumerate(dictionaries):
        if not isinstance(each, Mapping) or each.get("sweep") is None:
            made.append(each)
            continue
        made += _combinations(each, f"item {index}, sweep")
        if len(made) > MOST:
            raise ValueError(f"item {index}, sweep makes more than {MOST} dictionaries of the manifest")
    return made


def _combinations(dictionary: Mapping[str, Any], where: str) -> Iterator[dict[str, Any]]:
    sweep = dictionary["sweep"]
    if not isinstance(sweep, Mapping) or not sweep:
        raise ValueError(f"{where} is {_short(sweep)}, expected fields with a list of values each")
    for field, values in sweep.items():
        if not isinstance(field, str) or field in ("name", "sweep") or not all(field.split(".")):
            raise ValueError(f"{where} has the field {_short(field)}, expected one of the dictionary's, such as k")
        if not isinstance(values, list | tuple) or not values:
            raise ValueError(f"{where}: {field} is {_short(values)}, expected a list of values")
    for values in itertools.islice(itertools.product(*sweep.values()), MOST + 1):
        made = copy.deepcopy({key: value for key, value in dictionary.items() if key != "sweep"})
        for field, value in zip(sweep, values, strict=True):
            _put(made, field, value, where)
        parts = [f"{field.rpartition('.')[2]}{_word(value)}" for field, value in zip(sweep, values, strict=True)]
        made["name"] = "-".join([str(dictionary.get("name", "")), *parts])
        yield made


def _put(tree: dict[str, Any], field: str, value: Any, where: str) -> None:
    *parents, last = field.split(".")
    for key in parents:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise ValueError(f"{where}: {field}: {key} is {_short(tree)}, expected a section")
    tree[last] = copy.deepcopy(value)


def _word(value: Any) -> str:
    """A value as a part of a name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", str(value)).strip("_")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
