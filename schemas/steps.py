"""The steps of a manifest: their names, what each is made from, and which come once for each dictionary.

How a step is run is in `pipeline.stages`. Whoever only looks at a root needs no more than this, and so none of the
libraries that do the work.
"""

from __future__ import annotations

from dataclasses import dataclass

from schemas.manifest import Dictionary, Manifest


@dataclass(frozen=True, slots=True)
class Step:
    """One step. `needs` are the names of those that it is made from."""

    name: str
    needs: tuple[str, ...]
    per_dictionary: bool = True


TOKENIZE = Step("tokenize", (), per_dictionary=False)
HARVEST = Step("harvest", ("tokenize",), per_dictionary=False)
TRAIN = Step("train", ("harvest",))
EVALUATE = Step("evaluate", ("tokenize", "harvest", "train"))
CATALOG = Step("catalog", ("harvest", "train", "evaluate"))
EXPORT = Step("export", ("train", "catalog"))

# Of a world that is made up: there is no corpus.
GENERATE = Step("harvest", (), per_dictionary=False)
RECOVER = Step("evaluate", ("harvest", "train"))
IDENTIFY = Step("catalog", ("harvest", "train", "evaluate"))

STEPS = (TOKENIZE, HARVEST, TRAIN, EVALUATE, CATALOG, EXPORT)
# The same names, so that everything else finds stages, folders and labels where they always are.
SYNTHETIC_STEPS = (GENERATE, TRAIN, RECOVER, IDENTIFY, EXPORT)


def steps_of(manifest: Manifest) -> tuple[Step, ...]:
    """The steps of a manifest, in the order in which it runs them."""
    return STEPS if manifest.synthetic is None else SYNTHETIC_STEPS


def instances(manifest: Manifest) -> list[tuple[Step, Dictionary | None]]:
    """Every step that a run takes: the shared ones once, the others for each dictionary in turn."""
    steps = steps_of(manifest)
    shared: list[tuple[Step, Dictionary | None]] = [(step, None) for step in steps if not step.per_dictionary]
    return shared + [(step, dictionary) for dictionary in manifest.wanted for step in steps if step.per_dictionary]
