"""Which machines are about to be taken away.

An autoscaler, a pod's preStop hook or a handler of spot notices says so to Ray (`ray drain-node`). Ray places nothing
there any more, and otherwise leaves it to us: whoever works there has until the deadline to put his work down.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import Self

import ray
from ray._private.state import state
from ray.exceptions import RayError

from schemas.errors import BusyError

LOOK_SECONDS = 2.0
END_SECONDS = 1.0


class Notices:
    """Asks the cluster now and then. A context manager.

    In a thread, because a head that is away answers nobody until it is back, and a run has to hear a wish to stop
    meanwhile. There is no public call: this is the one that Ray's own libraries use.
    """

    def __init__(self) -> None:
        self._deadlines: Mapping[str, int] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep_asking, name="notices", daemon=True)

    def _keep_asking(self) -> None:
        while not self._over.is_set():
            # Not joined yet, or not any more.
            with suppress(RayError):
                self._deadlines = state.get_draining_nodes()
            self._over.wait(LOOK_SECONDS)

    @property
    def leaving(self) -> frozenset[str]:
        """Ids of the machines that are being taken away."""
        return frozenset(self._deadlines)

    def told(self, node: str, host: str) -> str:
        """The notice of a machine, for people."""
        deadline = self._deadlines.get(node, 0)
        left = f" within {max(0.0, deadline / 1000 - time.time()):.0f} s" if deadline else ""
        return f"{host} is being taken away{left}"

    def require_here(self) -> None:
        """Make sure that this process's machine stays: nothing new can be placed there, what leads a gang neither.

        Raises:
            BusyError: it is being taken away.
        """
        here = ray.get_runtime_context().get_node_id()
        if here in self.leaving:
            raise BusyError(
                f"{self.told(here, 'the machine of this run')}, so no gang can be led from here",
                "resume on another machine: everything committed is kept",
            )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        # Nobody may be asking when Ray is left. Where the head is away, the question ends with it.
        self._thread.join(END_SECONDS)
