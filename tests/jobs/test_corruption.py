"""Damage of every kind to every kind of committed object: found by `verify`, by a normal read, and repaired."""

import os
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.storage.path import StoragePath
from jobs import repair as repairs
from schemas.errors import IntegrityError
from tests.support import runs
from tests.support.damage import KINDS, MUTATIONS, PREFIXES, candidates, read_everything

SEED = int(os.environ.get("KILOBASIS_CHAOS_SEED", "20260922"))
# 17 kinds of object, 6 mutations: 102 in each round.
ROUNDS = [0] + [pytest.param(number, marks=pytest.mark.chaos) for number in range(1, 6)]


@pytest.fixture(scope="module")
def undamaged(finished: SimpleNamespace) -> dict[str, str]:
    read_everything(finished.manifest, finished.root)
    assert repairs.findings(StoragePath.parse(finished.root), full=True) == []
    return runs.contents(finished.root)


@pytest.mark.parametrize("number", ROUNDS)
@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_found_by_verify_and_by_a_normal_read_and_repaired(
    kind: str, mutation: str, number: int, finished: SimpleNamespace, undamaged: dict[str, str], tmp_path: Path
) -> None:
    rng = random.Random(f"{SEED} {kind} {mutation} {number}")
    root = tmp_path / "root"
    shutil.copytree(finished.root, root)
    every = candidates(root, kind)
    path = rng.choice(every)
    before = path.read_bytes()
    MUTATIONS[mutation](path, rng, [other for other in every if other != path])
    assert not path.exists() or path.read_bytes() != before
    base = StoragePath.parse(root)
    key = path.relative_to(root).as_posix()

    wrong = repairs.require_root(base)
    found = {finding.path.relative_to(base) + "/" + finding.key for finding in repairs.findings(base, full=True)}
    assert key in found or (wrong and kind == "root record"), f"seed {SEED}: verify did not find {mutation} of {key}"
    with pytest.raises(IntegrityError):
        read_everything(finished.manifest, root)

    manifest = finished.manifest
    list(repairs.repair(base, 1.0, lambda _: None))
    digests = runs.run_inline(manifest, f"root={root}")
    assert not repairs.require_root(base)
    assert repairs.findings(base, full=True) == []
    read_everything(finished.manifest, root)
    assert digests == runs.digests(finished.root)
    assert runs.contents(root) == undamaged


@pytest.mark.parametrize("prefix", PREFIXES)
def test_folder_that_is_gone_is_found_by_verify_and_by_a_normal_read_and_made_again(
    prefix: str, finished: SimpleNamespace, undamaged: dict[str, str], tmp_path: Path
) -> None:
    root = tmp_path / "root"
    shutil.copytree(finished.root, root)
    stages = sorted({path.parent.relative_to(root) for path in root.glob(f"{prefix}/**/COMMITTED.json")})
    assert stages
    (path,) = root.glob(prefix)
    shutil.rmtree(path)
    base = StoragePath.parse(root)

    found = {finding.path.relative_to(base) + "/" + finding.key for finding in repairs.findings(base, full=True)}
    assert {stage.as_posix() for stage in stages} <= found
    with pytest.raises(IntegrityError):
        read_everything(finished.manifest, root)

    list(repairs.repair(base, 1.0, lambda _: None))
    digests = runs.run_inline(finished.manifest, f"root={root}")
    assert repairs.findings(base, full=True) == []
    read_everything(finished.manifest, root)
    assert digests == runs.digests(finished.root)
    assert runs.contents(root) == undamaged
