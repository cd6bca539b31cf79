"""What a run that is too large is told to change is enough, and is the nearest that is."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.command import invoke
from tests.support.fixtures import write_manifest


def told(manifest: Path, *overrides: str) -> str:
    """The refusal of a plan; empty if there is none."""
    result = invoke("plan", manifest, *(word for override in overrides for word in ("--set", override)))
    assert result.code in (0, 2), result
    return str(result.err)


@pytest.mark.parametrize(
    ("limit", "overrides", "lever"),
    [
        ("16GiB", ["dictionaries.0.features=100000000"], "dictionaries.0.features"),
        ("4GiB", ["dictionaries.0.train.batch=2M", "dictionaries.0.train.tokens=9M"], "dictionaries.0.train.batch"),
        ("16GiB", ["compute.workers=64"], "compute.workers"),
    ],
)  # fmt: skip
def test_value_that_is_named_fits_and_is_not_far_from_what_does_not(
    limit: str, overrides: list[str], lever: str, tiny_tree: dict[str, Any], tmp_path: Path
) -> None:
    tiny_tree["compute"] |= {"pool": "ray", "memory": limit}
    manifest = write_manifest(tmp_path / "m.yaml", tiny_tree)
    line = told(manifest, *overrides)
    named = re.search(rf"{re.escape(lever)} to (\d+)", line)
    assert named, line
    value = int(named[1])
    while line := told(manifest, *overrides, f"{lever}={value}"):
        # Another stage did not fit either, and says which value it would take.
        named = re.search(rf"{re.escape(lever)} to (\d+)", line)
        assert named, line
        assert int(named[1]) < value
        value = int(named[1])
    assert told(manifest, *overrides, f"{lever}={value * 9 // 8 + 1}"), "a larger one would have done"


def test_feature_ranks_are_named_where_every_rank_has_a_machine(tiny_tree: dict[str, Any], tmp_path: Path) -> None:
    tiny_tree["compute"] |= {"pool": "ray", "memory": "42GiB", "address": "127.0.0.1:1", "workers": 1}
    manifest = write_manifest(tmp_path / "m.yaml", tiny_tree)
    large = "dictionaries.0.features=67108864"
    assert "compute.sharding.features to 8 or" in told(manifest, large)


def test_nothing_is_named_where_nothing_is_enough(tiny_tree: dict[str, Any], tmp_path: Path) -> None:
    tiny_tree["compute"] |= {"pool": "ray", "memory": "1GiB"}
    line = told(write_manifest(tmp_path / "m.yaml", tiny_tree))
    assert line.count("\n") == 1
    assert "lower compute.workers, and run it where there is more memory" in line
