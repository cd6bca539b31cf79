"""Several runs of one root, each with some of its dictionaries."""

import json
import shlex
from collections import deque
from pathlib import Path
from typing import Any

import pytest

from tests.support.command import invoke
from tests.support.fixtures import write_manifest
from tests.support.jobs_api import Job, JobsServer
from tests.support.runs import run_inline, start

NAMES = ("tiny", "wide")


@pytest.fixture
def manifest(tiny_tree: dict[str, Any], tmp_path: Path) -> Path:
    """Two dictionaries."""
    (first,) = tiny_tree["dictionaries"]
    tiny_tree["dictionaries"] = [first, first | {"name": "wide", "features": 96}]
    return write_manifest(tmp_path / "tiny.yaml", tiny_tree)


def only(*names: str) -> str:
    return f"compute.only={json.dumps(names)}"


def test_runs_with_a_dictionary_each_make_at_one_time_what_one_run_makes(manifest: Path, tmp_path: Path) -> None:
    runs = [
        start("run", str(manifest), "--on-busy", "wait", "--set", only(name), log=tmp_path / name) for name in NAMES
    ]
    assert [run.wait(120) for run in runs] == [0, 0], [(tmp_path / name).read_text() for name in NAMES]
    told = [(tmp_path / name).read_text() for name in NAMES]
    for mine, other, said in zip(NAMES, reversed(NAMES), told, strict=True):
        assert f"train/{mine}" in said
        assert f"train/{other}" not in said
    # One has made what they share, and the other has not made it again.
    assert sum("harvest              committed in" in said for said in told) == 1
    together = run_inline(manifest)
    assert set(NAMES) == {label.partition("/")[2] for label in together} - {""}
    assert together == run_inline(manifest, f"root={tmp_path / 'alone'}")


def test_root_is_asked_about_all_dictionaries_whatever_its_newest_run_made(manifest: Path) -> None:
    run_inline(manifest, only("wide"))
    root = manifest.parent / "root"
    stages = {each["stage"]: each["state"] for each in json.loads(invoke("status", root, "--json").out)["stages"]}
    assert (stages["train/wide"], stages["train/tiny"]) == ("committed", "waiting")
    assert invoke("resume", root).code == 0
    stages = {each["stage"]: each["state"] for each in json.loads(invoke("status", root, "--json").out)["stages"]}
    assert set(stages.values()) == {"committed"}


def test_plan_and_report_are_of_the_dictionaries_that_a_run_makes(manifest: Path) -> None:
    planned = json.loads(invoke("plan", manifest, "--set", only("wide"), "--json").out)
    assert not any("tiny" in stage["stage"] for stage in planned)
    run_inline(manifest, only("wide"))
    assert set(json.loads(invoke("report", manifest, "--set", only("wide"), "--json").out)) == {"digests", "wide"}
    missing = invoke("report", manifest)
    assert "catalog/tiny is not committed" in missing.err


def test_dictionary_that_is_not_there_is_refused(manifest: Path) -> None:
    result = invoke("plan", manifest, "--set", only("tiny", "large"))
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert "compute.only names 'large', which is no dictionary; there are ['tiny', 'wide']" in result.err


def test_each_dictionary_is_a_job_of_its_own_and_submitted_once(manifest: Path) -> None:
    manifest.write_text(manifest.read_text().replace("pool: inline", "pool: ray"))
    with JobsServer() as server:
        server.next = deque([Job("PENDING"), Job("PENDING")])
        result = invoke("submit", manifest, "--address", server.url, "--each")
        assert (result.code, result.err) == (0, "")
        again = invoke("submit", manifest, "--address", server.url, "--each")
    assert again.out.count("is there already") == 2
    for asked, name in zip(server.submitted, NAMES, strict=True):
        assert asked["submission_id"].startswith(f"kilobasis-tiny-{name}-")
        command = shlex.split(asked["entrypoint"])
        assert command[:7] == ["python", "-m", "jobs", "run", "job/tiny.yaml", "--on-busy", "wait"]
        assert only(name) in command
