"""The commands, on one finished tiny run and on copies of it."""

import functools
import http.server
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
import yaml

import jobs
from jobs.terminal import manifest_of
from tests.support.command import Result, invoke, snapshot
from tests.support.fixtures import write_manifest
from tests.support.roots import events, lose_a_unit, newest

Tree = dict[str, Any]
QUICKSTART = Path(jobs.__path__[0]) / "manifests" / "quickstart.yaml"
STAGES = ["tokenize", "harvest", "train/tiny", "evaluate/tiny", "catalog/tiny", "export/tiny"]


def planned(manifest: Path, *overrides: str) -> dict[str, dict[str, Any]]:
    """What `plan --json` says of each stage."""
    result = invoke("plan", manifest, "--json", *(word for override in overrides for word in ("--set", override)))
    assert result.code == 0, result.err
    stages = json.loads(result.out)
    assert [stage["stage"] for stage in stages] == STAGES
    return {stage["stage"]: stage for stage in stages}


def actions(manifest: Path, *overrides: str) -> list[str]:
    return [stage["action"] for stage in planned(manifest, *overrides).values()]


def report(manifest: Path, *overrides: str) -> dict[str, Any]:
    result = invoke("report", manifest, "--json", *(word for override in overrides for word in ("--set", override)))
    assert result.code == 0, result.err
    found: dict[str, Any] = json.loads(result.out)
    return found


def ran(root: Path) -> list[str]:
    """The stages that the newest run did itself."""
    return [e["stage"] for e in events(newest(root)) if e["event"] == "StageCommitted" and not e["skipped"]]


def outputs(root: Path) -> dict[str, str]:
    """Everything below the root but what each run notes of itself."""
    return {key: value for key, value in snapshot(root).items() if not key.startswith("runs")}


# plan


def test_plan_before_any_run_runs_every_stage(tiny_manifest: Path) -> None:
    stages = planned(tiny_manifest)
    assert {stage["action"] for stage in stages.values()} == {"RUN"}
    assert stages["tokenize"]["reason"] == "not run yet"
    assert stages["export/tiny"]["reason"] == "after train, catalog"


def test_plan_table_names_every_stage_with_its_action(tiny_manifest: Path) -> None:
    result = invoke("plan", tiny_manifest)
    rows = [line.split("│")[1:3] for line in result.out.splitlines() if line.startswith("│")]
    assert [(stage.strip(), action.strip()) for stage, action in rows] == [(stage, "RUN") for stage in STAGES]
    assert (result.code, result.err) == (0, "")


def test_plan_writes_nothing(tiny_manifest: Path, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    assert invoke("plan", tiny_manifest).code == 0
    assert invoke("plan", tiny_manifest, "--json").code == 0
    assert snapshot(tmp_path) == before


def test_plan_after_a_run_skips_every_stage_and_writes_nothing(finished: SimpleNamespace) -> None:
    before = snapshot(finished.root)
    stages = planned(finished.manifest)
    assert {stage["action"] for stage in stages.values()} == {"SKIP"}
    digests = report(finished.manifest)["digests"]
    assert all(digests[name][:12] in stage["reason"] for name, stage in stages.items())
    assert snapshot(finished.root) == before


def test_plan_after_a_run_knows_the_rows_exactly(finished: SimpleNamespace) -> None:
    stages = planned(finished.manifest)
    record = json.loads((Path(stages["harvest"]["folder"]) / "COMMITTED.json").read_text())
    assert stages["harvest"]["rows"] == record["rows"]
    assert stages["harvest"]["units"] == len(record["units"])


def test_plan_estimates_are_near_what_a_run_makes(tiny_manifest: Path, finished: SimpleNamespace) -> None:
    estimated, true = planned(tiny_manifest)["harvest"], planned(finished.manifest)["harvest"]
    assert estimated["rows"] == pytest.approx(true["rows"], rel=0.25)
    (folder,) = (finished.root / "harvest").iterdir()
    stored = sum(path.stat().st_size for path in folder.rglob("activations.zarr/*/c/**/*") if path.is_file())
    assert true["stored_bytes"] == pytest.approx(stored, rel=0.25)


def test_plan_partial_stage_resumes_at_the_unit(copied: SimpleNamespace) -> None:
    lose_a_unit(copied.root)
    stages = planned(copied.manifest)
    assert stages["tokenize"]["action"] == "SKIP"
    assert (stages["harvest"]["action"], stages["harvest"]["reason"]) == ("RESUME", "2 of 3 units")
    assert [stages[name]["action"] for name in STAGES[2:]] == ["RUN"] * 4


@pytest.mark.parametrize(
    ("override", "field", "expected"),
    [
        ("corpus.min_tokens=4", "min_tokens: 8 -> 4", ["RUN"] * 6),
        ("harvest.seed=1", "seed: 0 -> 1", ["SKIP"] + ["RUN"] * 5),
        ("dictionaries.0.train.learning_rate=0.001", "learning_rate: 0.003 -> 0.001", ["SKIP"] * 2 + ["RUN"] * 4),
        ("dictionaries.0.k=5", "k: 4 -> 5", ["SKIP"] * 2 + ["RUN"] * 4),
        ("dictionaries.0.evaluate.tokens=1024", "tokens: 2048 -> 1024", ["SKIP"] * 3 + ["RUN"] * 3),
        ("dictionaries.0.catalog.window=5", "window: 4 -> 5", ["SKIP"] * 4 + ["RUN"] * 2),
        ("dictionaries.0.export=[]", "formats: ", ["SKIP"] * 5 + ["RUN"]),
    ],
)
def test_plan_changed_field_reruns_from_its_stage_and_is_named(
    override: str, field: str, expected: list[str], finished: SimpleNamespace
) -> None:
    stages = planned(finished.manifest, override)
    assert [stage["action"] for stage in stages.values()] == expected
    first = next(stage for stage in stages.values() if stage["action"] == "RUN")
    assert first["reason"].startswith("changed ")
    assert field in first["reason"]


def test_plan_table_is_not_cut_where_nobody_looks(finished: SimpleNamespace) -> None:
    result = invoke("plan", finished.manifest, "--set", "dictionaries.0.train.learning_rate=0.001")
    assert "learning_rate: 0.003 -> 0.001" in result.out


def test_plan_changed_compute_reruns_nothing(finished: SimpleNamespace) -> None:
    assert actions(finished.manifest, "compute.workers=5", "compute.threads=2") == ["SKIP"] * 6


def test_plan_corpus_over_http_is_read(tiny_tree: Tree, tiny_corpus: Path, tmp_path: Path) -> None:
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tiny_corpus))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            tiny_tree["corpus"]["source"] = f"http://127.0.0.1:{server.server_port}/part-0.jsonl"
            result = invoke("plan", write_manifest(tmp_path / "m.yaml", tiny_tree))
        finally:
            server.shutdown()
            thread.join()
    assert result.code == 0, result.err


# run and resume


def test_run_commits_every_stage_and_prints_the_report(finished: SimpleNamespace) -> None:
    assert "FVU" in finished.result.out
    (page,) = [line.removeprefix("report: ") for line in finished.result.out.splitlines() if "report: " in line]
    assert Path(page).read_text().lower().startswith("<!doctype html>")
    assert ran(finished.root) == STAGES


def test_run_again_does_nothing_and_keeps_the_digests(copied: SimpleNamespace) -> None:
    before, digests = outputs(copied.root), report(copied.manifest)["digests"]
    result = invoke("run", copied.manifest)
    assert result.code == 0, result.err
    assert ran(copied.root) == []
    assert outputs(copied.root) == before
    assert report(copied.manifest)["digests"] == digests


def test_run_elsewhere_makes_the_same_digests(tiny_manifest: Path, finished: SimpleNamespace) -> None:
    result = invoke("run", tiny_manifest)
    assert result.code == 0, result.err
    assert report(tiny_manifest)["digests"] == report(finished.manifest)["digests"]


@pytest.mark.parametrize("command", ["run", "resume"])
def test_run_after_a_lost_unit_redoes_it_alone(command: str, copied: SimpleNamespace) -> None:
    digests = report(copied.manifest)["digests"]
    lose_a_unit(copied.root)
    result = invoke(command, copied.manifest)
    assert result.code == 0, result.err
    assert ran(copied.root) == ["harvest"]
    assert [e["unit"] for e in events(newest(copied.root)) if e["event"] == "UnitCommitted"] == ["000001"]
    assert report(copied.manifest)["digests"] == digests


def test_run_changed_field_adds_folders_and_overwrites_none(copied: SimpleNamespace) -> None:
    before, digests = outputs(copied.root), report(copied.manifest)["digests"]
    change = "dictionaries.0.train.learning_rate=0.001"
    assert invoke("run", copied.manifest, "--set", change).code == 0
    assert ran(copied.root) == STAGES[2:]
    after = outputs(copied.root)
    assert before.items() <= after.items()
    assert report(copied.manifest, change)["digests"]["train/tiny"] != digests["train/tiny"]
    assert report(copied.manifest)["digests"] == digests


def test_resume_without_a_run_is_refused(tiny_manifest: Path, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    result = invoke("resume", tiny_manifest)
    assert result.code == 2
    assert "has no run to resume -> start one with `kilobasis run`" in result.err
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("command", ["status", "resume", "report"])
def test_commands_know_from_the_root_alone_what_its_manifest_was(command: str, copied: SimpleNamespace) -> None:
    by_manifest, before = invoke(command, copied.manifest), outputs(copied.root)
    copied.manifest.unlink()
    result = invoke(command, copied.root)
    assert result.code == 0, result.err
    # Another run may have begun in between.
    assert result.out.splitlines()[1:] == by_manifest.out.splitlines()[1:]
    assert outputs(copied.root) == before


def test_manifest_of_a_root_names_no_cluster_that_may_be_gone_and_may_be_of_an_earlier_version(
    copied: SimpleNamespace,
) -> None:
    (run,) = (copied.root / "runs").iterdir()
    written = json.loads((run / "manifest.json").read_text())
    written["compute"]["address"] = "10.0.0.1:6379"
    written["dictionaries"][0]["train"]["beta1"] = None
    (run / "manifest.json").write_text(json.dumps(written))
    found = manifest_of(str(copied.root), None)
    assert found.compute.address is None
    assert found.dictionaries[0].train.beta1 == 0.9
    assert manifest_of(str(copied.root), ["compute.address=auto"]).compute.address == "auto"


def test_resume_of_a_root_makes_what_is_missing(copied: SimpleNamespace) -> None:
    digests = report(copied.manifest)["digests"]
    shutil.rmtree(copied.root / "dictionaries" / "tiny" / "evaluate")
    copied.manifest.unlink()
    result = invoke("resume", copied.root, "--set", "compute.workers=1")
    assert result.code == 0, result.err
    assert ran(copied.root) == ["evaluate/tiny"]
    assert report(copied.root)["digests"] == digests


def test_what_a_root_cannot_say_is_refused_in_a_line(copied: SimpleNamespace, tmp_path: Path) -> None:
    for target, sets, words in (
        (tmp_path / "nothing", (), "is no Kilobasis root"),
        (copied.root, ("--set", "compute.wrokers=1"), "did you mean 'workers'?"),
        (copied.root, ("--set", "root=elsewhere"), "the root is"),
        (tmp_path / ("x" * 300), (), "x" * 300),
        (copied.root, ("--set", "dictionaries.0.k=5"), "dictionaries.0.k: 4 -> 5"),
    ):
        result = invoke("resume", target, *sets)
        assert result.code in (2, 3)
        (line,) = result.err.splitlines()
        assert words in line
    for run in (copied.root / "runs").iterdir():
        (run / "manifest.json").unlink()
    assert "has no run to resume" in invoke("resume", copied.root).err


def test_resume_of_a_changed_manifest_is_refused_with_the_diff(copied: SimpleNamespace) -> None:
    before = snapshot(copied.root)
    result = invoke("resume", copied.manifest, "--set", "dictionaries.0.k=5", "--set", "harvest.seed=9")
    assert result.code == 3
    (line,) = result.err.splitlines()
    assert "dictionaries.0.k: 4 -> 5" in line
    assert "harvest.seed: 0 -> 9" in line
    assert "`kilobasis run`" in line
    assert snapshot(copied.root) == before


def test_resume_with_another_compute_is_the_same_run(copied: SimpleNamespace) -> None:
    result = invoke("resume", copied.manifest, "--set", "compute.workers=1")
    assert result.code == 0, result.err
    assert ran(copied.root) == []


@pytest.mark.parametrize("name", ["COMMITTED.json", "units/000000.json"])
def test_run_damaged_record_is_an_integrity_error_that_names_it(name: str, copied: SimpleNamespace) -> None:
    (folder,) = (copied.root / "harvest").iterdir()
    if name != "COMMITTED.json":
        (folder / "COMMITTED.json").unlink()
    (folder / name).write_text("{}")
    result = invoke("run", copied.manifest)
    assert result.code == 4
    assert f"{folder / name} is no valid" in result.err.splitlines()[-1]


# report


def test_report_gives_the_page_and_the_final_numbers(finished: SimpleNamespace) -> None:
    found = report(finished.manifest)
    assert Path(found["tiny"]["report"]).is_file()
    judged = found["tiny"]["metrics"]
    assert 0.0 < judged["dictionary"]["fvu"] < 1.0
    assert judged["dictionary"]["l0"] == pytest.approx(4.0, abs=0.5)
    assert set(found["digests"]) == set(STAGES)
    plain = invoke("report", finished.manifest)
    assert f"{judged['dictionary']['fvu']:.4f}" in plain.out
    assert found["tiny"]["report"] in plain.out


def test_report_of_a_run_that_has_none_is_refused(copied: SimpleNamespace) -> None:
    shutil.rmtree(copied.root / "dictionaries" / "tiny" / "catalog")
    result = invoke("report", copied.manifest)
    assert result.code == 2
    assert "catalog/tiny is not committed" in result.err


# schema, events, TensorBoard


def test_schema_prints_a_json_schema_that_the_quickstart_satisfies() -> None:
    result = invoke("schema")
    assert result.code == 0
    schema = json.loads(result.out)
    jsonschema.Draft202012Validator.check_schema(schema)
    quickstart = yaml.safe_load(QUICKSTART.read_text())
    jsonschema.validate(quickstart, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(quickstart | {"unheard_of": 1}, schema)


def test_run_leaves_events_of_every_stage_as_json_lines(finished: SimpleNamespace) -> None:
    found = events(newest(finished.root))
    assert [event["stage"] for event in found if event["event"] == "StageCommitted"] == STAGES
    assert all(isinstance(event["time"], float) for event in found)
    assert [event["time"] for event in found] == sorted(event["time"] for event in found)
    units = [event["unit"] for event in found if event["event"] == "UnitCommitted" and event["stage"] == "harvest"]
    assert sorted(units) == ["000000", "000001", "000002"]
    last = [event for event in found if event["event"] == "Progress"][-1]
    assert (last["done"], last["total"]) == (8192, 8192)
    assert {"fvu", "l0", "dead", "learning_rate"} <= last["scalars"].keys()


def test_run_tells_what_it_moved_to_and_from_the_store(finished: SimpleNamespace) -> None:
    told = [event for event in events(newest(finished.root)) if event["event"] == "StoreUsed"]
    for stage, folder in (("tokenize", "tokenize"), ("harvest", "harvest")):
        kept = sum(path.stat().st_size for path in (finished.root / folder).rglob("*") if path.is_file())
        written = sum(event["written_bytes"] for event in told if event["stage"] == stage)
        # Beside its objects a stage has leases and heartbeats, and the run a log.
        assert 0.9 * kept < written < 1.2 * kept + 20_000
    harvested = sum(path.stat().st_size for path in (finished.root / "harvest").rglob("c/**/*") if path.is_file())
    assert sum(event["read_bytes"] for event in told if event["stage"] == "train/tiny") > harvested / 2
    assert not any(event["retries"] for event in told)


def test_run_leaves_tensorboard_scalars_of_training(finished: SimpleNamespace) -> None:
    board = newest(finished.root) / "tensorboard"
    logged = {path.parent.relative_to(board).as_posix(): path.read_bytes() for path in board.rglob("events.out.*")}
    assert {"tokenize", "harvest", "train/tiny"} <= logged.keys()
    assert b"fvu" in logged["train/tiny"]
    assert b"rows_per_second" in logged["harvest"]


def test_run_keeps_the_manifest_of_every_run(copied: SimpleNamespace) -> None:
    assert invoke("run", copied.manifest, "--set", "compute.workers=1").code == 0
    first, second = (
        json.loads((run / "manifest.json").read_text()) for run in sorted((copied.root / "runs").iterdir())
    )
    assert (first["compute"]["workers"], second["compute"]["workers"]) == (2, 1)
    assert first["dictionaries"] == second["dictionaries"]


# The real process


def console(*arguments: str) -> Result:
    script = Path(sys.executable).parent / "kilobasis"
    done = subprocess.run([script, *arguments], capture_output=True, text=True, timeout=60, check=False)
    return Result(done.returncode, done.stdout, done.stderr)


def test_console_script_help_lists_the_commands() -> None:
    result = console("--help")
    assert result.code == 0
    assert all(command in result.out for command in ("plan", "run", "status", "resume", "report", "schema"))


def test_console_script_bad_input_ends_with_2_and_one_line(tmp_path: Path) -> None:
    result = console("plan", str(tmp_path / "none.yaml"))
    assert (result.code, result.out) == (2, "")
    assert result.err == f"kilobasis: manifest {tmp_path / 'none.yaml'} does not exist -> check the path\n"
