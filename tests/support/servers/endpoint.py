"""Where an object store answers, and what a client has to know of it."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Endpoint:
    """A bucket that exists, and the environment in which every client finds it.

    Nothing else configures a client: users reach their stores by the same variables.

    Attributes:
        name: The server's.
        root: URL of the bucket or container, empty when it was made.
        environment: Variables of the provider's own chain.
        real: Whether people keep their data in this software, so that what it does is what a store does.
        port: Where it listens, on 127.0.0.1.
    """

    name: str
    root: str
    environment: Mapping[str, str]
    real: bool
    port: int

    @property
    def bucket(self) -> str:
        """The bucket's own name."""
        return self.root.partition("://")[2]

    @property
    def address(self) -> str:
        """Host and port, as they stand in the environment."""
        return f"127.0.0.1:{self.port}"
