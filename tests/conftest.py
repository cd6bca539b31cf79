"""What every test gets."""

import os

# Before anything imports ray: a Ray of a test is loopback only, and its daemons must agree on the token.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", "0" * 64)
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

pytest_plugins = [
    "tests.support.fixtures",
    "tests.support.long_runs",
    "tests.support.servers.fixtures",
    "tests.support.stores",
]
