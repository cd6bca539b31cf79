"""The dashboard for Grafana shows what a run says to Prometheus, and nothing that nobody says."""

import dataclasses
import json
import re
from typing import Any

import pytest
import torch

from jobs import progress
from pipeline.dictionary.model import DictionaryConfig
from pipeline.dictionary.pace import Pace
from pipeline.dictionary.trainer import StepScalars
from schemas import events
from tests.support.runs import ROOT

DASHBOARD = ROOT / "cluster" / "deploy" / "grafana" / "kilobasis.json"
# Not known of a device without a data sheet.
OF_A_GPU = {"mfu"}


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return found


class Shown:
    """Gauges that remember."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def close(self) -> None:
        """As theirs."""

    def set(self, name: str, value: float, **tags: str) -> None:
        assert tags.keys() == {"run", "stage"}
        self.values[name] = value


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Shown:
    made = Shown()
    monkeypatch.setattr(progress, "Gauges", lambda: made)
    return made


def tell(watcher: progress.Prometheus) -> None:
    """Everything that a run may say of a stage."""
    config = DictionaryConfig(width=4, features=8, k=2, hook_point="h", model="m", model_digest="")
    pace = Pace(config, torch.device("cpu"), 1, 0)
    pace.wait(0.1, ready=4)
    pace.scalars(1, 10)
    scalars = {each.name: 0.5 for each in dataclasses.fields(StepScalars)} | pace.scalars(2, 20)
    watcher(events.StageStarted("harvest", 2, 9, "harvest/abc"))
    watcher(events.QueueChanged("harvest", 5, 2))
    watcher(events.UnitCommitted("harvest", "000002", 500, 2.0, 2**20))
    watcher(events.StoreUsed("harvest", 2**20, 2**10, 3))
    watcher(events.StoreUsed("harvest", 2**20, 2**10, 0))
    watcher(events.WorkerLost("harvest", "SIGKILL", 1))
    watcher(events.WorkerLost("harvest", "SIGKILL", 2))
    watcher(events.UnitFailed("harvest", "000003", "boom", 1, 3, ""))
    watcher(events.Progress("train/a", 2, 20, 100, scalars))
    watcher(events.CheckpointCommitted("train/a", 2, 0.1))
    watcher(events.StageCommitted("harvest", 9.0, "d" * 64, "harvest/abc"))


def test_prometheus_counts_units_and_trouble(shown: Shown) -> None:
    tell(progress.Prometheus("mine"))
    named = {name.removeprefix("kilobasis_"): value for name, value in shown.values.items()}
    assert (named["units_done"], named["units_total"]) == (3, 9)
    assert (named["workers_lost"], named["units_failed"]) == (2, 1)
    assert (named["rows_per_second"], named["peak_memory_bytes"]) == (250, 2**20)
    assert (named["checkpoint_step"], named["stage_seconds"]) == (2, 9)
    assert (named["units_waiting"], named["units_running"], named["batches_ready"]) == (5, 2, 4)
    assert (named["store_read_bytes"], named["store_written_bytes"], named["store_retries"]) == (2**21, 2**11, 3)


def test_numbers_are_there_before_anything_goes_wrong(shown: Shown) -> None:
    """An alarm on what was never told would not go off."""
    progress.Prometheus("mine")(events.StageStarted("harvest", 0, 9, "harvest/abc"))
    assert shown.values["kilobasis_workers_lost"] == shown.values["kilobasis_units_failed"] == 0


def test_stage_that_begins_again_keeps_its_trouble(shown: Shown) -> None:
    watcher = progress.Prometheus("mine")
    tell(watcher)
    watcher(events.StageStarted("harvest", 5, 9, "harvest/abc"))
    assert (shown.values["kilobasis_workers_lost"], shown.values["kilobasis_units_done"]) == (2, 5)


def test_dashboard_asks_for_what_is_said(dashboard: dict[str, Any], shown: Shown) -> None:
    tell(progress.Prometheus("mine"))
    said = {f"ray_{name}" for name in shown.values} | {f"ray_kilobasis_{name}" for name in OF_A_GPU}
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked += [each["definition"] for each in dashboard["templating"]["list"] if each["type"] == "query"]
    metrics = {name for expression in asked for name in re.findall(r"ray_\w+", expression)}
    assert metrics
    assert metrics <= said
    # Every number is one run's, and those of stages are theirs.
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            names = re.findall(r"ray_\w+(\{[^}]*\})?", target["expr"])
            # Training has a panel of its own, and no units.
            named = {name.replace(', stage!~"train/.*"', "") for name in names}
            assert named == {'{run=~"$run", stage=~"$stage"}'}


def test_dashboard_shows_what_an_operator_has_to_see(dashboard: dict[str, Any]) -> None:
    asked = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    paces = ("rows_per_second", "tokens_per_second", "mfu", "store_read_bytes", "store_written_bytes", "dead")
    queues, trouble = (
        ("units_waiting", "units_running", "batches_ready"),
        ("workers_lost", "units_failed", "store_retries"),
    )
    for name in (*paces, *queues, *trouble):
        assert f"ray_kilobasis_{name}{{" in asked


def test_dashboard_is_laid_out(dashboard: dict[str, Any]) -> None:
    """Panels have numbers of their own, lie within 24 columns, and on no other one."""
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken
        taken |= cells
    names = {each["name"] for each in dashboard["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", DASHBOARD.read_text())) <= names
