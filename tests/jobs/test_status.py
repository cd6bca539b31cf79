"""`status`: what it says of stages that are committed, run, were stopped, or never began."""

import copy
import json
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.storage.path import StoragePath
from jobs.log import SlotLog
from schemas.layouts import beat_key
from schemas.records import Owner
from tests.support.command import invoke
from tests.support.fixtures import write_manifest
from tests.support.roots import dead_process, events, lose_a_unit, lose_last_word, newest

STAGES = ["tokenize", "harvest", "train/tiny", "evaluate/tiny", "catalog/tiny", "export/tiny"]


def status(manifest: Path) -> dict[str, Any]:
    result = invoke("status", manifest, "--json")
    assert result.code == 0, result.err
    found: dict[str, Any] = json.loads(result.out)
    return found


def test_status_after_a_run_shows_every_stage_committed(finished: SimpleNamespace) -> None:
    found = status(finished.manifest)
    assert [(stage["stage"], stage["state"]) for stage in found["stages"]] == [(name, "committed") for name in STAGES]
    by_name = {stage["stage"]: stage for stage in found["stages"]}
    assert (by_name["harvest"]["done"], by_name["harvest"]["total"]) == (3, 3)
    assert by_name["train/tiny"]["scalars"]["l0"] == pytest.approx(4.0)
    assert found["run"] == newest(finished.root).name


def test_status_of_a_killed_run_shows_where_it_stopped(copied: SimpleNamespace) -> None:
    lose_a_unit(copied.root)
    noted = newest(copied.root) / "process.json"
    noted.write_text(json.dumps(json.loads(noted.read_text()) | {"pid": dead_process()}))
    lose_last_word(newest(copied.root))
    found = status(copied.manifest)
    by_name = {stage["stage"]: stage for stage in found["stages"]}
    assert found["alive"] is False
    assert by_name["tokenize"]["state"] == "committed"
    assert (by_name["harvest"]["state"], by_name["harvest"]["done"], by_name["harvest"]["total"]) == ("stopped", 2, 3)
    assert "not running" in invoke("status", copied.manifest).out


def test_status_of_a_living_run_on_this_machine_is_running(copied: SimpleNamespace) -> None:
    # The run's process is this one.
    lose_last_word(newest(copied.root))
    assert status(copied.manifest)["alive"] is True


def test_status_of_a_run_on_another_machine_does_not_guess(copied: SimpleNamespace) -> None:
    noted = newest(copied.root) / "process.json"
    noted.write_text(json.dumps({"host": "elsewhere.invalid", "pid": 1}))
    lose_last_word(newest(copied.root))
    assert status(copied.manifest)["alive"] is None
    assert "on another machine" in invoke("status", copied.manifest).out


def test_status_of_a_stage_that_never_began_is_waiting(copied: SimpleNamespace) -> None:
    run = newest(copied.root)
    kept = [event for event in events(run) if event["stage"] in ("tokenize", "harvest")]
    shutil.rmtree(run / "events")
    (run / "events").mkdir()
    (run / "events" / "000000.jsonl").write_text("".join(json.dumps(event) + "\n" for event in kept))
    shutil.rmtree(copied.root / "dictionaries/tiny/train")
    states = {stage["stage"]: stage["state"] for stage in status(copied.manifest)["stages"]}
    assert states["harvest"] == "committed"
    # What comes after it was made from a training that is not there.
    assert {states[name] for name in STAGES[2:]} == {"waiting"}


@pytest.mark.parametrize("killed", ["before it said anything", "before it had a manifest"])
def test_status_after_a_run_that_was_killed_at_once_is_what_the_records_say(
    killed: str, copied: SimpleNamespace
) -> None:
    """A resume that dies before its first flush leaves a newer run without events."""
    young = copied.root / "runs" / "29991231T235959.000000Z-abcdef"
    young.mkdir()
    if killed == "before it said anything":
        earlier = sorted((copied.root / "runs").iterdir())[-2]
        shutil.copy(earlier / "manifest.json", young)
    found = status(copied.manifest)
    assert found["run"] == young.name
    assert [stage["state"] for stage in found["stages"]] == ["committed"] * len(STAGES)
    by_name = {stage["stage"]: stage for stage in found["stages"]}
    assert (by_name["harvest"]["done"], by_name["harvest"]["total"]) == (3, 3)
    assert by_name["train/tiny"]["scalars"]["l0"] == pytest.approx(4.0)


def test_status_without_any_event_is_what_the_records_say(copied: SimpleNamespace) -> None:
    for run in (copied.root / "runs").iterdir():
        shutil.rmtree(run / "events")
    lose_a_unit(copied.root)
    found = {stage["stage"]: stage for stage in status(copied.manifest)["stages"]}
    assert (found["tokenize"]["state"], found["harvest"]["state"]) == ("committed", "stopped")
    assert found["harvest"]["done"] == 2
    assert found["train/tiny"]["state"] == "waiting"


def test_status_after_the_manifest_was_changed_is_about_the_manifest_that_is_asked_for(
    copied: SimpleNamespace, tmp_path: Path
) -> None:
    """Two folders of the same stage: the older one is the one of the manifest."""
    tree = copy.deepcopy(copied.tree)
    tree["dictionaries"][0]["train"]["learning_rate"] = 2e-3
    changed = write_manifest(tmp_path / "changed.yaml", tree)
    assert invoke("run", changed).code == 0
    (copied.root / last_trained(copied.root) / "COMMITTED.json").unlink()
    for manifest, expected in ((changed, "stopped"), (copied.manifest, "committed")):
        states = {stage["stage"]: stage["state"] for stage in status(manifest)["stages"]}
        assert (states["harvest"], states["train/tiny"]) == ("committed", expected)


def last_trained(root: Path) -> str:
    """The folder of the newest run's training, below the root."""
    (folder,) = {
        event["folder"]
        for event in events(newest(root))
        if event["event"] == "StageCommitted" and event["stage"] == "train/tiny"
    }
    return str(Path(folder).relative_to(root))


class TestStatusElsewhere:
    """A stage that is led from another machine: its lease and its signs of life say whether it runs."""

    def led(self, root: Path, silent: float, **fields: Any) -> dict[str, Any]:
        """Put a lease of another machine's behind the others of a stage that is not committed, and look."""
        lose_a_unit(root)
        (folder,) = (root / "harvest").iterdir()
        log = SlotLog(StoragePath.parse(folder))
        log.refresh()
        record = log.take(Owner(host="elsewhere.invalid", boot="b", namespace="n", pid=7, started=1.0))
        assert record is not None
        beat = folder / beat_key(record.epoch, record.nonce)
        beat.write_text(json.dumps({"counter": 9, "released": False, "seconds": 90.0} | fields))
        os.utime(beat, (time.time() - silent,) * 2)
        (shown,) = [
            each
            for each in status(write_manifest(root.parent / "m.yaml", self.tree))["stages"]
            if each["stage"] == "harvest"
        ]
        return shown

    @pytest.fixture(autouse=True)
    def _tree(self, copied: SimpleNamespace) -> None:
        self.tree, self.root = copied.tree, copied.root

    def test_stage_whose_owner_beats_is_running(self) -> None:
        shown = self.led(self.root, silent=10)
        assert (shown["state"], shown["done"]) == ("running", 2)
        assert shown["detail"] == "led by elsewhere.invalid, process 7"

    def test_stage_whose_lease_was_given_back_is_stopped(self) -> None:
        assert self.led(self.root, silent=0, released=True)["state"] == "stopped"

    def test_stage_whose_owner_is_silent_is_stopped(self) -> None:
        shown = self.led(self.root, silent=600)
        assert shown["state"] == "stopped"
        assert "no sign of life from elsewhere.invalid, process 7 for 60" in shown["detail"]

    def test_stage_whose_owner_may_be_silent_for_longer_is_running(self) -> None:
        assert self.led(self.root, silent=600, seconds=1200.0)["state"] == "running"


def test_status_of_a_damaged_record_says_so(copied: SimpleNamespace) -> None:
    (record,) = (copied.root / "harvest").glob("*/COMMITTED.json")
    record.write_bytes(record.read_bytes()[:-9])
    found = {stage["stage"]: stage for stage in status(copied.manifest)["stages"]}
    assert found["harvest"]["state"] == "damaged"
    assert "kilobasis verify" in found["harvest"]["detail"]
