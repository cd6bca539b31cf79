"""What every test gets."""

import os

import pytest

# Before anything imports ray: a Ray of a test is loopback only, and its daemons must agree on the token.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", "0" * 64)
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Files whose tests take minutes, longest first. Two at a time, a long one that begins last leaves the other core idle.
LONGEST = (
    "tests/test_ray_chaos.py",
    "tests/jobs/test_crashes.py",
    "tests/test_end_to_end.py",
    "tests/test_machines.py",
    "tests/test_benchmarks.py",
    "tests/pipeline/dictionary/test_meshes.py",
    "tests/jobs/test_interruptions.py",
    "tests/jobs/test_storage_faults.py",
    "tests/jobs/test_protocol.py",
    "tests/jobs/test_corruption.py",
    "tests/cluster/test_gang.py",
)

pytest_plugins = [
    "tests.support.fixtures",
    "tests.support.long_runs",
    "tests.support.servers.fixtures",
    "tests.support.stores",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files come first; everything else stays in its order."""
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.nodeid.partition("::")[0], len(rank)))
