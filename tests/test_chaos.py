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
from schemas.records import StageRecord, parse_record
from tests.support import runs

QUICKSTART = runs.ROOT / "jobs" / "manifests" / "quickstart.yaml"

# Training leaves an object at every checkpoint; often enough, a kill can fall anywhere in it.
OFTEN = ("--set", "compute.checkpoint_seconds=3")

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.timeout(7200)]


def finish(verb: str, root: Path, log: Path) -> None:
    process = runs.start(verb, str(QUICKSTART), "--set", f"root={root}", *OFTEN, log=log)
    assert process.wait(timeout=1800) == 0, log.read_text()[-4000:]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart as it is meant to be run."""
    folder = tmp_path_factory.mktemp("undisturbed")
    finish("run", folder / "root", folder / "log")
    return folder / "root"


def stage_reached(root: Path) -> str:
    """What a kill hit: the stage that was not committed yet."""
    committed = {parse_record(StageRecord, path.read_bytes(), "here").stage for path in root.rglob("COMMITTED.json")}
    order = ["tokenize", "harvest", "train/resid", "evaluate/resid", "catalog/resid", "export/resid"]
    return next((stage for stage in order if stage not in committed), "nothing left")


def progress(root: Path) -> int:
    """How many objects lie in the stages' folders: it grows through every stage."""
    return sum(
        not path.name.startswith(".") and path.is_file()
        for folder in ("tokenize", "harvest", "dictionaries")
        for path in (root / folder).rglob("*")
    )


def test_quickstart_killed_twenty_times_has_the_digests_of_an_undisturbed_run(
    undisturbed: Path, tmp_path: Path
) -> None:
    """Kills are spread at random over the whole run: over the objects that it writes, and up to 3 s behind one."""
    seed = int(os.environ.get("KILOBASIS_CHAOS_SEED", random.SystemRandom().randrange(10**6)))
    kills = int(os.environ.get("KILOBASIS_CHAOS_KILLS", "20"))
    rng = random.Random(seed)
    root, log = tmp_path / "root", tmp_path / "log"
    moments = sorted(rng.uniform(0.0, 1.0) for _ in range(kills))
    print(f"\nseed {seed}, {kills} kills", file=sys.stderr)
    for kill, moment in enumerate(moments, start=1):
        verb = "resume" if (root / "runs").exists() else "run"
        process = runs.start(verb, str(QUICKSTART), "--set", f"root={root}", *OFTEN, log=log)
        began, wanted = time.monotonic(), moment * progress(undisturbed)
        while process.poll() is None and progress(root) < wanted:
            time.sleep(0.05)
        time.sleep(rng.uniform(0.0, 3.0) + 12.0 * rng.random() * (time.monotonic() - began < 1.0))
        finished = process.poll() is not None
        assert not finished or process.returncode == 0, log.read_text()[-4000:]
        runs.kill_tree(process)
        again = len(runs.unfinished_units(root))
        assert again <= 2, "more than one unit per worker has to be done again"
        where = "behind the last stage" if finished else f"in {stage_reached(root)}"
        print(f"kill {kill} after {time.monotonic() - began:.1f} s {where}, {again} units again", file=sys.stderr)
    finish("resume" if (root / "runs").exists() else "run", root, log)
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
        record = parse_record(StageRecord, record_path.read_bytes(), "here")
        assert record.peak_memory <= figures[record.stage], record.stage
