"""The nearest manifest that fits: what a user whose run is too large can change, and to which value.

Nothing here guesses. Every value that is named was put into the manifest, which was checked and estimated again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from pydantic import ValidationError

from pipeline.stage import Estimate, Sources, Stage
from schemas.errors import ManifestError
from schemas.manifest import Dictionary, Manifest

# What makes a stage smaller, in the order in which one would rather give it up. A leading dot: of the dictionary.
LEVERS: dict[str, tuple[str, ...]] = {
    "train": (
        "harvest.loader_memory",
        "compute.sharding.features",
        "compute.sharding",
        "compute.zero.offload",
        "compute.zero.stage",
        "compute.accumulate",
        ".train.second_moment",
        ".train.weights",
        ".train.beta1",
        ".train.batch",
        ".features",
        ".expansion",
    ),
    "tokenize": ("compute.workers",),
    "harvest": ("compute.workers", "compute.gpus", "harvest.batch_tokens", "harvest.unit_rows"),
}
OTHERS = ("compute.workers", "compute.gpus", ".features", ".expansion")
NAMED = 3


def nearest(
    stage: Stage,
    dictionary: Dictionary | None,
    manifest: Manifest,
    sources: Sources,
    fits: Callable[[Estimate, Manifest], bool],
) -> str:
    """What to do about a stage that does not fit, as a sentence for people.

    Args:
        stage: What is too large.
        dictionary: Of which dictionary, if it has one.
        manifest: The manifest that asks for it.
        sources: The model and the corpus.
        fits: Whether there is room for an estimate of another manifest.

    Returns:
        Up to `NAMED` changes, each of which is enough by itself; or that none is.
    """
    found = []
    for lever in LEVERS.get(stage.name, OTHERS):
        index = manifest.dictionaries.index(dictionary) if dictionary is not None else 0
        path = f"dictionaries.{index}{lever}" if lever.startswith(".") else lever
        tree = manifest.model_dump(mode="json")
        for value in _smaller(path, _value(tree, path), manifest.compute.sharding.features):
            _value(tree, path, value)
            try:
                changed = Manifest.model_validate(tree)
                of = None if dictionary is None else changed.dictionaries[index]
                stage.check(changed, of, sources)
                enough = fits(stage.estimate(changed, of, sources), changed)
            except (ValidationError, ManifestError):
                continue
            if enough:
                found.append(f"{path} to {_shown(value)}")
                break
        if len(found) == NAMED:
            break
    if not found:
        names = [lever.removeprefix(".") for lever in LEVERS.get(stage.name, OTHERS)]
        what = f"lower {names[0]}, and" if len(names) == 1 else f"none of {', '.join(names)} is enough by itself;"
        return f"{what} run it where there is more memory"
    return f"set {' or '.join(found)}"


def _value(tree: Any, path: str, value: Any = None) -> Any:
    """The value at a dotted path of a manifest as plain data; put one there instead, if it is given."""
    *parents, last = path.split(".")
    for key in parents:
        tree = tree[int(key)] if isinstance(tree, list) else tree[key]
    if value is not None:
        tree[last] = value
    return tree[last]


def _shown(value: Any) -> str:
    """A value as one writes it behind `--set`.

    >>> _shown({"features": 4, "data": 1}), _shown(7)
    ('{features: 4, data: 1}', '7')
    """
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {each}" for key, each in value.items()) + "}"
    return str(value)


def _smaller(path: str, now: Any, parts: int) -> Iterator[Any]:
    """Values of a lever that make its stage smaller, the nearest first."""
    if path.endswith("second_moment"):
        yield "row"
    elif path.endswith("train.weights"):
        yield "bfloat16"
    elif path.endswith("train.beta1"):
        yield 0.0
    elif path.endswith("compute.gpus"):
        # Fewer share one.
        yield from (now * 2**power for power in range(1, 7) if 0 < now * 2**power <= 1)
    elif path.endswith("compute.sharding"):
        # As many ranks, of which more share the features.
        powers = (2**power for power in range(1, 11) if now["data"] % 2**power == 0)
        yield from ({"features": now["features"] * each, "data": now["data"] // each} for each in powers)
    elif path.endswith("zero.offload"):
        yield "cpu"
    elif path.endswith("zero.stage"):
        yield from range(now + 1, 4)
    elif path.endswith(("sharding.features", "accumulate")):
        yield from (now * 2**power for power in range(1, 11))
    elif now is not None:
        # In sixteenths down to a half, and again from there: large steps for what is far too large.
        even = parts if path.endswith(".features") else 1
        tried = now
        while tried > 1:
            for sixteenths in range(15, 7, -1):
                value = tried * sixteenths // 16 // even * even
                if value:
                    yield value
            tried //= 2
