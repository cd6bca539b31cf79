"""moto: a mock of Amazon S3 with the newest API, conditional multipart uploads included. It checks no secrets."""

import importlib.util
import sys
from pathlib import Path

from tests.support.servers.s3 import S3Server


class MotoServer(S3Server):
    """One process of moto."""

    name = "moto"
    real = False

    @classmethod
    def missing(cls) -> str | None:
        """Part of the dev extra."""
        found = all(importlib.util.find_spec(module) for module in ("moto", "flask", "flask_cors"))
        return None if found else "moto is not installed (pip install -e '.[dev]')"

    def start(self) -> None:
        """Start it; every start is empty."""
        script = Path(__file__).with_name("moto_server.py")
        self.processes.start("moto", sys.executable, "-P", script, "-H", "127.0.0.1", "-p", str(self.port))
        self.processes.wait_for(self.port)
