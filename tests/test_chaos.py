"""The quickstart, killed twenty times. Slow: `make chaos`.

The seed is printed; KILOBASIS_CHAOS_SEED repeats a run, KILOBASIS_CHAOS_KILLS changes the number of kills.
"""

import json
import os
import random
import sys
import time
from pathlib import Path

import pytest

from jobs import manifest as manifests
from jobs import plan as planning
from jobs.sources import survey
from jobs.workspace import Workspace
from schemas.records import StageRecord
from tests.support import runs

QUICKSTART = runs.ROOT / "jobs" / "manifests" / "quickstart.yaml"

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.timeout(7200)]


def finish(verb: str, root: Path, log: Path) -> None:
    process = runs.start(verb, str(QUICKSTART), "--set", f"root={root}", log=log)
    assert process.wait(timeout=1800) == 0, log.read_text()[-4000:]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart as it is meant to be run."""
    folder = tmp_path_factory.mktemp("undisturbed")
    finish("run", folder / "root", folder / "log")
    return folder / "root"


def stage_reached(root: Path) -> str:
    """What a kill hit: the stage that was not committed yet."""
    committed = {StageRecord.model_validate_json(path.read_bytes()).stage for path in root.rglob("COMMITTED.json")}
    order = ["tokenize", "harvest", "train/resid", "evaluate/resid", "catalog/resid", "export/resid"]
    return next((stage for stage in order if stage not in committed), "nothing left")


def test_quickstart_killed_twenty_times_has_the_digests_of_an_undisturbed_run(
    undisturbed: Path, tmp_path: Path
) -> None:
    seed = int(os.environ.get("KILOBASIS_CHAOS_SEED", random.SystemRandom().randrange(10**6)))
    kills = int(os.environ.get("KILOBASIS_CHAOS_KILLS", "20"))
    rng = random.Random(seed)
    root, log = tmp_path / "root", tmp_path / "log"
    lines = [f"seed {seed}, {kills} kills"]
    for kill in range(kills):
        verb = "resume" if (root / "runs").exists() else "run"
        process = runs.start(verb, str(QUICKSTART), "--set", f"root={root}", log=log)
        began, moment = time.monotonic(), rng.uniform(2.0, 45.0)
        while process.poll() is None and time.monotonic() - began < moment:
            time.sleep(0.02)
        finished = process.poll() is not None
        assert not finished or process.returncode == 0, log.read_text()[-4000:]
        runs.kill_tree(process)
        assert len(runs.unfinished_units(root)) <= 2, "more than one unit per worker has to be done again"
        lines.append(f"kill {kill + 1} after {moment:.1f} s: {'was done' if finished else 'in ' + stage_reached(root)}")
    finish("resume" if (root / "runs").exists() else "run", root, log)
    print("\n".join(lines), file=sys.stderr)
    assert runs.digests(root) == runs.digests(undisturbed)
    assert runs.contents(root) == runs.contents(undisturbed)


def test_quickstart_reaches_its_marks_within_its_memory(undisturbed: Path) -> None:
    (path,) = undisturbed.glob("dictionaries/resid/evaluate/*/metrics.json")
    judged = json.loads(path.read_text())
    ours = judged["dictionary"]
    assert ours["fvu"] < 0.2
    assert ours["dead"] < 0.05
    assert ours["ce_recovered"] > 0.9
    for baseline in ("random", "pca"):
        assert ours["fvu"] < 0.5 * judged[baseline]["fvu"]
        assert ours["ce_recovered"] > judged[baseline]["ce_recovered"]
    parsed = manifests.load(QUICKSTART, [f"root={undisturbed}"])
    planned = planning.make(parsed, Workspace.of(parsed), survey(parsed))
    figures = {each.label: each.estimate.memory for each in planned.stages}
    for record_path in undisturbed.rglob("COMMITTED.json"):
        record = StageRecord.model_validate_json(record_path.read_bytes())
        assert record.peak_memory <= figures[record.stage], record.stage
