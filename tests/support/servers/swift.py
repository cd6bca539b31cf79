"""OpenStack Swift with its S3 API: a store that people use, and whose create-if-absent several writers can win.

It looks whether a name is free and then takes it, so `If-None-Match: *` refuses a name that has been there for a
while, but lets writers through who come at the same moment. A protocol that trusts the store alone is wrong here.
"""

import os
import tempfile
from pathlib import Path

from tests.support.servers.s3 import S3Server
from tests.support.servers.server import INSTALLED

PYTHON = INSTALLED / "swift" / "bin" / "python"


def keeps_attributes(folder: Path) -> bool:
    """Whether files there can have extended attributes, in which Swift keeps an object's metadata."""
    with tempfile.NamedTemporaryFile(dir=folder) as probe:
        try:
            os.setxattr(probe.name, "user.kilobasis", b"x")
        except OSError:
            return False
    return True


class SwiftServer(S3Server):
    """All of Swift's servers in one process."""

    name = "swift"
    real = True
    key = "kilobasis:test"

    @classmethod
    def missing(cls) -> str | None:
        """A virtual environment of its own."""
        return None if PYTHON.exists() else "Swift is not installed (make servers)"

    @classmethod
    def parent(cls) -> Path:
        """The first place that keeps attributes; the last one is on the disk of the checkout."""
        places = (Path("/tmp"), Path("/var/tmp"), INSTALLED)
        return next((place for place in places if keeps_attributes(place)), places[-1])

    def start(self) -> None:
        """Start it; every start is empty."""
        node = Path(__file__).with_name("swift_node.py")
        where = (self.processes.folder, str(self.port))
        self.processes.start("swift", PYTHON, "-P", "-W", "ignore", node, *where, self.key, self.secret)
        self.processes.wait_for(self.port)
