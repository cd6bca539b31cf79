"""What every object store of the tests can do: start, hand out buckets, say why it cannot be started, end."""

import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

from tests.support.servers.endpoint import Endpoint
from tests.support.servers.processes import Processes, free_port

# Where `make servers` puts what is not installed system-wide.
INSTALLED = Path(__file__).parents[3] / ".servers"


class Server(ABC):
    """An object store on 127.0.0.1 that lives until it is closed. Making one starts it."""

    name: ClassVar[str]
    scheme: ClassVar[str]
    real: ClassVar[bool]

    def __init__(self) -> None:
        self.port = free_port()
        self.processes = Processes(self.name, self.parent())
        try:
            self.start()
            self.endpoint = self.bucket()
        except BaseException:
            self.close()
            raise

    @classmethod
    @abstractmethod
    def missing(cls) -> str | None:
        """What is not installed here and how to install it, in one line; None where the server can be started."""

    @classmethod
    def parent(cls) -> Path:
        """Where the server's folder is made; short by default, because the path of a Unix socket has 107 characters."""
        return Path("/tmp")

    @property
    @abstractmethod
    def environment(self) -> Mapping[str, str]:
        """Variables by which the provider's own chain finds the server."""

    @abstractmethod
    def start(self) -> None:
        """Start the processes and return when they answer on `port`."""

    @abstractmethod
    def make_bucket(self, name: str) -> None:
        """Make a bucket."""

    def bucket(self) -> Endpoint:
        """A fresh, empty bucket."""
        name = f"kb-test-{uuid.uuid4().hex[:16]}"
        self.make_bucket(name)
        return Endpoint(self.name, f"{self.scheme}://{name}", self.environment, self.real, self.port)

    def close(self) -> None:
        """End the processes and remove what they stored."""
        self.processes.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
