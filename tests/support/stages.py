"""Single stages, run inline and committed, without a workspace around them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.pool import InlinePool
from cluster.storage.path import StoragePath
from jobs import plan
from jobs.out import StageOut
from jobs.sources import survey
from jobs.state import StageFolder
from jobs.workspace import label
from pipeline.stage import Committed, Sources
from pipeline.stages import STAGES
from schemas.manifest import Manifest


@dataclass(frozen=True)
class Run:
    """A finished run of a manifest with one dictionary: its stages by their names."""

    manifest: Manifest
    model: Path
    corpus: Path
    stages: Mapping[str, Committed]


def by_name(done: Mapping[str, Committed]) -> dict[str, Committed]:
    """The stages of a run without the dictionary's name in theirs."""
    return {name.partition("/")[0]: committed for name, committed in done.items()}


def manifest_of(tree: dict[str, Any]) -> Manifest:
    """The manifest that a tree of plain values describes."""
    return Manifest.model_validate(tree)


def sources_of(manifest: Manifest, inputs: Mapping[str, Committed]) -> Sources:
    """What planning knows of model and corpus, with the true number of rows where they are tokenized."""
    sources = survey(manifest)
    return plan.refine(sources, inputs["tokenize"]) if "tokenize" in inputs else sources


def run_stage(name: str, manifest: Manifest, folder: Path, inputs: Mapping[str, Committed]) -> Committed:
    """Run one stage of a manifest's first dictionary into a folder of its own, and commit it."""
    (stage,) = [stage for stage in STAGES if stage.name == name]
    dictionary = manifest.dictionaries[0] if stage.per_dictionary else None
    stage_folder = StageFolder(StoragePath.parse(folder), label(stage, dictionary), "0" * 64)
    out = StageOut(stage_folder, InlinePool(), manifest.compute, lambda event: None)
    params = stage.params(manifest, dictionary, sources_of(manifest, inputs))
    outputs = stage.run({need: inputs[need] for need in stage.needs}, params, out)
    digests = {need: inputs[need].record.digest for need in stage.needs}
    return stage_folder.commit(outputs, out.records, digests, 0.0, 0)
