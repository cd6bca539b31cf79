"""Every stage, in the order in which a manifest runs them."""

from __future__ import annotations

from pipeline import catalog, evaluate, export, harvest, tokenize, train
from pipeline.stage import Stage, Together

STAGES: tuple[Stage, ...] = (
    Stage("tokenize", 1, (), tokenize.params, tokenize.run, tokenize.estimate, tokenize.check, per_dictionary=False),
    Stage(
        "harvest", 1, ("tokenize",), harvest.params, harvest.run, harvest.estimate, harvest.check, per_dictionary=False
    ),
    Stage(
        "train",
        3,
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
