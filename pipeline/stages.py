"""Every stage, in the order in which a manifest runs them."""

from __future__ import annotations

from pipeline import catalog, evaluate, export, generate, harvest, identify, recover, tokenize, train
from pipeline.stage import Stage, Together
from schemas.manifest import Manifest

STAGES: tuple[Stage, ...] = (
    Stage("tokenize", 1, (), tokenize.params, tokenize.run, tokenize.estimate, tokenize.check, per_dictionary=False),
    Stage(
        "harvest", 1, ("tokenize",), harvest.params, harvest.run, harvest.estimate, harvest.check, per_dictionary=False
    ),
    Stage(
        "train",
        6,
        ("harvest",),
        train.params,
        train.run,
        train.estimate,
        train.check,
        together=Together(train.shared, train.run_together),
    ),
    Stage(
        "evaluate",
        2,
        ("tokenize", "harvest", "train"),
        evaluate.params,
        evaluate.run,
        evaluate.estimate,
        evaluate.check,
    ),
    Stage("catalog", 3, ("harvest", "train", "evaluate"), catalog.params, catalog.run, catalog.estimate, catalog.check),
    Stage("export", 1, ("train", "catalog"), export.params, export.run, export.estimate, export.check),
)

# The same names, so that everything else finds stages, folders and labels where they always are.
SYNTHETIC_STAGES: tuple[Stage, ...] = (
    Stage("harvest", 1, (), generate.params, generate.run, generate.estimate, generate.check, per_dictionary=False),
    *(stage for stage in STAGES if stage.name == "train"),
    Stage("evaluate", 1, ("harvest", "train"), recover.params, recover.run, recover.estimate, recover.check),
    Stage(
        "catalog", 2, ("harvest", "train", "evaluate"), identify.params, identify.run, identify.estimate, identify.check
    ),
    *(stage for stage in STAGES if stage.name == "export"),
)


def stages_of(manifest: Manifest) -> tuple[Stage, ...]:
    """The stages of a manifest, in the order in which it runs them."""
    return STAGES if manifest.synthetic is None else SYNTHETIC_STAGES
