"""What a benchmark has to reach, and how every script writes its numbers."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

Fact = dict[str, Any]


@dataclass(frozen=True)
class Mark:
    """A value, and the bound on it. A value of None could not be measured, and misses the mark."""

    name: str
    value: float | None
    side: Literal["at least", "at most"]
    bound: float

    @property
    def met(self) -> bool:
        """Whether the value keeps to the bound.

        >>> Mark("speed", 1.7, "at least", 1.6).met, Mark("memory", 0.6, "at most", 0.5).met
        (True, False)
        """
        if self.value is None:
            return False
        return self.value >= self.bound if self.side == "at least" else self.value <= self.bound


def show(marks: Sequence[Mark], console: Console) -> int:
    """Print every mark; returns the exit code, 1 where one was missed."""
    if marks:
        table = Table(title="marks")
        for heading in ("mark", "measured", "wanted", ""):
            table.add_column(heading, justify="right" if heading == "measured" else "left", no_wrap=True)
        for mark in marks:
            value = "not measured" if mark.value is None else f"{mark.value:.3f}"
            table.add_row(mark.name, value, f"{mark.side} {mark.bound:g}", "pass" if mark.met else "FAIL")
        console.print(table)
    return 0 if all(mark.met for mark in marks) else 1


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median and range, for people.

    >>> spread([1.0, 3.0, 2.0])
    '2.00 (1.00..3.00)'
    """
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}..{high:.{digits}f})"


def fact(name: str, values: Sequence[float], unit: str, config: dict[str, Any]) -> Fact:
    """One number for programs: the median, with every value beside its configuration."""
    return {
        "name": name,
        "value": statistics.median(values),
        "unit": unit,
        "config": config | {"every": list(values)},
    }


def write(path: Path | None, facts: Sequence[Fact]) -> None:
    """Write facts as JSON, where a file is asked for."""
    if path is not None:
        path.write_text(json.dumps(list(facts), indent=1) + "\n")
