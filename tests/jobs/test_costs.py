"""What `plan` says that the rest of a run costs."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.costs import seen
from schemas.events import Progress, UnitCommitted
from tests.support.command import invoke


def planned(manifest: Path, *words: str) -> dict[str, dict[str, Any]]:
    result = invoke("plan", manifest, "--json", *words)
    assert result.code == 0, result.err
    return {each["stage"]: each for each in json.loads(result.out)}


def test_hours_are_rows_by_the_pace_of_all_workers(tiny_manifest: Path) -> None:
    found = planned(
        tiny_manifest, "--rate", "harvest=10", "--rate", "train=4", "--rate", "train/tiny=2",
        *("--set", "compute.workers=2", "--set", "compute.checkpoint_seconds=7"),
    )  # fmt: skip
    harvest, train = found["harvest"], found["train/tiny"]
    assert harvest["cost"]["hours"] == pytest.approx(harvest["rows"] / 10 / 2 / 3600)
    assert harvest["cost"]["lost_seconds"] == pytest.approx(harvest["rows"] / harvest["units"] / 10)
    assert harvest["cost"]["gpu_hours"] == 0
    # What is said of one stage counts before what is said of all of its kind.
    assert train["cost"]["hours"] == pytest.approx(train["rows"] / 2 / 3600)
    assert train["cost"]["lost_seconds"] == 7
    assert found["evaluate/tiny"]["cost"] is None
    shown = invoke("plan", tiny_manifest, "--rate", "harvest=10").out
    assert "GPU hours" in shown
    assert "GPU hours" not in invoke("plan", tiny_manifest).out


def test_pace_is_what_earlier_runs_had_and_only_what_is_left_counts(copied: SimpleNamespace) -> None:
    (folder,) = (copied.root / "harvest").iterdir()
    (folder / "COMMITTED.json").unlink()
    units = sorted((folder / "units").glob("*.json"))
    for unit in units[1:]:
        unit.unlink()
    found = planned(copied.manifest)
    cost = found["harvest"]["cost"]
    left = found["harvest"]["rows"] - found["harvest"]["rows"] // found["harvest"]["units"]
    workers = min(found["harvest"]["workers"], found["harvest"]["units"])
    assert cost["rows_per_second"] > 0
    assert cost["hours"] == pytest.approx(left / cost["rows_per_second"] / workers / 3600)
    assert found["tokenize"]["cost"] is None
    given = planned(copied.manifest, "--rate", "harvest=1")["harvest"]["cost"]
    assert given["hours"] == pytest.approx(left / workers / 3600)


def test_gpus_are_those_of_all_workers_that_take_some(tiny_manifest: Path) -> None:
    from jobs import costs, manifest, plan
    from jobs.sources import survey
    from jobs.workspace import Workspace

    parsed = manifest.load(tiny_manifest, ["compute.workers=2", "compute.gpus=0.5"])
    sources = survey(parsed)
    made = plan.make(parsed, Workspace.of(parsed), sources)
    found = costs.costs(made, {"harvest": 1.0, "tokenize": 1.0, "train": 1.0, "catalog": 1.0}, {})
    assert found["harvest"].gpu_hours == pytest.approx(found["harvest"].hours * 2 * 0.5)
    assert found["catalog/tiny"].gpu_hours == pytest.approx(found["catalog/tiny"].hours * 2 * 0.5)
    # A rank has one for itself.
    assert found["train/tiny"].gpu_hours == pytest.approx(found["train/tiny"].hours)
    # Text is none's.
    assert found["tokenize"].gpu_hours == 0


def test_what_runs_in_one_pass_is_counted_once(tiny_manifest: Path) -> None:
    sweep = ("--set", "dictionaries.0.sweep={k: [2, 4]}", "--rate", "train=10")
    trained = [each["cost"] for name, each in planned(tiny_manifest, *sweep).items() if name.startswith("train/")]
    assert len(trained) == 2
    shown = invoke("plan", tiny_manifest, "--set", "dictionaries.0.train.tokens=10M", *sweep).out
    _, shown = shown.split("what is left")
    hours = [float(line.split("│")[3]) for line in shown.splitlines() if line.startswith(("│ train", "│ all"))]
    assert len(hours) == 3
    assert hours[0] == hours[1] == hours[2] > 1


def test_pace_of_a_gang_is_its_newest_and_that_of_workers_their_mean() -> None:
    told = [
        UnitCommitted("harvest", "0", 100, 1.0, 0), UnitCommitted("harvest", "1", 100, 3.0, 0),
        UnitCommitted("export/a", "0", 0, 1.0, 0), Progress("train/a", 1, 1, 2, {"tokens_per_second": 5.0}),
        Progress("train/a", 2, 2, 2, {"tokens_per_second": 7.0}), Progress("train/b", 1, 1, 2, {"fvu": 0.5}),
    ]  # fmt: skip
    assert seen(told) == {"harvest": 50.0, "train/a": 7.0}


@pytest.mark.parametrize(
    ("rate", "words"),
    [
        ("harvest", "is not of the form STAGE=ROWS"),
        ("harvest=0", "is not of the form"),
        ("harvest=inf", "is not of the form"),
        ("=3", "is not of the form"),
        ("havrest=3", "'havrest', which is no stage of this manifest"),
    ],
)
def test_rate_that_is_none_is_refused_in_a_line(rate: str, words: str, tiny_manifest: Path) -> None:
    result = invoke("plan", tiny_manifest, "--rate", rate)
    assert result.code == 2
    (line,) = result.err.splitlines()
    assert words in line
