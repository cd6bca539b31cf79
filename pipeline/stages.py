"""How each step of a manifest is run."""

from __future__ import annotations

from pipeline import catalog, evaluate, export, generate, harvest, identify, recover, tokenize, train
from pipeline.stage import Stage, Together
from schemas import steps
from schemas.manifest import Manifest

STAGES: tuple[Stage, ...] = (
    Stage(steps.TOKENIZE, 1, tokenize.params, tokenize.run, tokenize.estimate, tokenize.check),
    Stage(steps.HARVEST, 1, harvest.params, harvest.run, harvest.estimate, harvest.check),
    Stage(
        steps.TRAIN,
        7,
        train.params,
        train.run,
        train.estimate,
        train.check,
        together=Together(train.shared, train.run_together),
    ),
    Stage(steps.EVALUATE, 3, evaluate.params, evaluate.run, evaluate.estimate, evaluate.check),
    Stage(steps.CATALOG, 3, catalog.params, catalog.run, catalog.estimate, catalog.check),
    Stage(steps.EXPORT, 1, export.params, export.run, export.estimate, export.check),
)

SYNTHETIC_STAGES: tuple[Stage, ...] = (
    Stage(steps.GENERATE, 1, generate.params, generate.run, generate.estimate, generate.check),
    *(stage for stage in STAGES if stage.step is steps.TRAIN),
    Stage(steps.RECOVER, 2, recover.params, recover.run, recover.estimate, recover.check),
    Stage(steps.IDENTIFY, 3, identify.params, identify.run, identify.estimate, identify.check),
    *(stage for stage in STAGES if stage.step is steps.EXPORT),
)


def stages_of(manifest: Manifest) -> tuple[Stage, ...]:
    """The stages of a manifest, in the order in which it runs them."""
    return STAGES if manifest.synthetic is None else SYNTHETIC_STAGES
