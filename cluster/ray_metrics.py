"""Numbers for dashboards, by Ray's own exporter: every machine of a cluster serves them for Prometheus."""

from __future__ import annotations

import sys
import threading
from typing import Any

# Ray forgets a gauge that is not said again for two of its intervals, which are a second at least.
AGAIN_SECONDS = 1.0

# Held while a Ray ends: nobody says anything to one that is half gone.
ending = threading.Lock()


class Gauges:
    """Gauges of one process that has joined a Ray, said again and again until they are closed.

    Before that, and without Ray, they are only remembered.
    """

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}
        self._values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._lock, self._over = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None

    def set(self, name: str, value: float, **tags: str) -> None:
        """Say a value.

        Args:
            name: Letters, digits and `_`; Prometheus shows it with `ray_` in front.
            value: From now on.
            tags: Of which run, which stage; the same ones every time.
        """
        with self._lock:
            self._values[name, tuple(tags.items())] = value
        if self._thread is None:
            self._thread = threading.Thread(target=self._keep_saying, name="gauges", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Say nothing any more."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def _keep_saying(self) -> None:
        while not self._over.wait(AGAIN_SECONDS):
            with self._lock:
                values = dict(self._values)
            # Importing ray before its session would take its settings away; and it may be half imported.
            is_initialized = getattr(sys.modules.get("ray"), "is_initialized", lambda: False)
            with ending:
                if is_initialized():
                    for (name, tags), value in values.items():
                        self._say(name, dict(tags), value)

    def _say(self, name: str, tags: dict[str, str], value: float) -> None:
        if name not in self._made:
            from ray.util.metrics import Gauge

            self._made[name] = Gauge(name, tag_keys=tuple(tags))
        self._made[name].set(value, tags)
