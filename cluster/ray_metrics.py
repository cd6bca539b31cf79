"""Numbers for dashboards, by Ray's own exporter: every machine of a cluster serves them for Prometheus."""

from __future__ import annotations

import sys
from typing import Any


class Gauges:
    """Gauges of one process that has joined a Ray; before that, and without Ray, setting one does nothing."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def set(self, name: str, value: float, **tags: str) -> None:
        """Say a value.

        Args:
            name: Letters, digits and `_`; Prometheus shows it with `ray_` in front.
            value: From now on.
            tags: Of which run, which stage; the same ones every time.
        """
        # Importing ray before its session would take its settings away.
        ray = sys.modules.get("ray")
        if ray is None or not ray.is_initialized():
            return
        if name not in self._made:
            from ray.util.metrics import Gauge

            self._made[name] = Gauge(name, tag_keys=tuple(tags))
        self._made[name].set(value, tags)
