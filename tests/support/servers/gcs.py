"""gcp-storage-emulator: a weak mock of Google Cloud Storage.

It ignores preconditions, so every create-if-absent succeeds, and answers ranges from an object's end wrongly. Nothing
is shown by a run against it except that a store like this one is refused.
"""

import importlib.util
import json
import sys
import urllib.request
from collections.abc import Mapping

from tests.support.servers.server import Server


class GcsServer(Server):
    """One process of the emulator, all in memory."""

    name = "gcs"
    scheme = "gs"
    real = False

    @classmethod
    def missing(cls) -> str | None:
        """Part of the dev extra."""
        if importlib.util.find_spec("gcp_storage_emulator") is None:
            return "gcp-storage-emulator is not installed (pip install -e '.[dev]')"
        return None if importlib.util.find_spec("gcsfs") else "gcsfs is not installed (pip install -e '.[gs]')"

    @property
    def environment(self) -> Mapping[str, str]:
        """What gcsfs reads, the second variable when it is imported: without it, it asks a gRPC service and hangs."""
        return {
            "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{self.port}",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }

    def start(self) -> None:
        """Start it; every start is empty."""
        where = ["--host", "127.0.0.1", "--port", str(self.port), "--in-memory"]
        self.processes.start("gcs", sys.executable, "-m", "gcp_storage_emulator", "start", *where)
        self.processes.wait_for(self.port)

    def make_bucket(self, name: str) -> None:
        """Make a bucket."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/storage/v1/b?project=kilobasis",
            data=json.dumps({"name": name}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            answer.read()
