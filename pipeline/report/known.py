"""The report's section on known features: plain HTML and SVG, which need no script to be read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from markupsafe import Markup

Place = Callable[[float], float]

WIDTH, HEIGHT = 280, 190
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 16, 38
BINS = 25


@dataclass(frozen=True, slots=True)
class Known:
    """What the section draws.

    Attributes:
        metrics: The dictionary's, with `mmcs_found`, `mmcs_true` and `found` where any feature fired.
        cosines_of_known: Largest cosine of every represented known feature with a feature of the dictionary.
        by_fires: As `pipeline.recovery.scores.by_fires`, of these; empty where no feature fired.
        cosines_of_features: Largest cosine of every feature that fired with a represented known one.
        toys: The harvest's toy models, see `pipeline.synthetic.toy.figure`; empty for a world.
        hook_point: Whose dictionary this is.
        matches: As `schemas.tables.MATCHES`, of the features that the report shows.
    """

    metrics: Mapping[str, Any]
    cosines_of_known: npt.NDArray[np.float32]
    by_fires: Sequence[Mapping[str, Any]]
    cosines_of_features: npt.NDArray[np.float32]
    toys: Sequence[Mapping[str, Any]]
    hook_point: str
    matches: pa.Table


def section(known: Known) -> Markup:
    """The section, as HTML."""
    count = len(known.cosines_of_known)
    found = round(known.metrics.get("found", 0.0) * count)
    figures = [
        _figure(
            "Known features, largest cosine",
            _histogram(known.cosines_of_known, "known features"),
            "How near the nearest feature of this dictionary comes to each known one. What piles up at 1 was found.",
        ),
        _figure(
            "Features, largest cosine",
            _histogram(known.cosines_of_features, "features that fired"),
            "How near each feature that fired comes to a known one. What is far left says something that is not there.",
        ),
    ]
    if known.toys:
        figures += _toy_figures(known, found)
    else:
        figures += [
            _figure(
                "Found",
                _recall(known.cosines_of_known),
                "Share of known features whose nearest feature is at least so near.",
            ),
            _figure(
                "Found, by how often active",
                _shares(known.by_fires),
                "Share within a cosine of 0.9, pale 0.7, of the known features that were active on so many rows of "
                "training, or up to ten times as many.",
            ),
        ]
    summary = "No feature fired on held-out rows, so none can be compared."
    if "mmcs_found" in known.metrics:
        summary = (
            f"MMCS {known.metrics['mmcs_found']:.3f} from known features to this dictionary's, "
            f"{known.metrics['mmcs_true']:.3f} back: the mean of the largest cosines. {found:,} of {count:,} known "
            "features have a feature within a cosine of 0.9."
        )
    # Numbers and words of this module alone.
    return Markup(  # noqa: S704
        '<section id="known" aria-labelledby="known-title">\n  <h2 id="known-title">Known features</h2>\n'
        f'  <p>{summary}</p>\n  <div class="figures four">\n{"".join(figures)}  </div>\n</section>'
    )


def _figure(title: str, svg: str, caption: str) -> str:
    return f'    <figure><h3>{title}</h3><div class="plot">{svg}</div><figcaption>{caption}</figcaption></figure>\n'


def _toy_figures(known: Known, found: int) -> list[str]:
    """Features per dimension, and dimensions per feature, against 1 / (1 - S): Elhage et al. 2022, on geometry."""
    at = [1.0 / (1.0 - toy["sparsity"]) for toy in known.toys]
    marked = [toy["hook_point"] == known.hook_point for toy in known.toys]
    per_dimension = [toy["features_per_dimension"] for toy in known.toys]
    per_feature = [toy["dimensions_per_feature"] for toy in known.toys]
    here = next(toy["sparsity"] for toy in known.toys if toy["hook_point"] == known.hook_point)
    return [
        _figure(
            "Features per dimension",
            _line(at, per_dimension, marked, "1 / (1 − S)", f"{found:,} found"),
            "What the toy model represents, ‖W‖² / m, at each sparsity of the manifest; this dictionary's, "
            f"S = {here:g}, is marked. The sparser features are, the more of them share a neuron.",
        ),
        _figure(
            "Dimensions per feature",
            _line(at, per_feature, marked, "1 / (1 − S)", f"S = {here:g}"),
            "The inverse, m / ‖W‖²: 1 for features that have a neuron each, less in superposition.",
        ),
    ]


def _histogram(values: npt.NDArray[np.float32], unit: str) -> str:
    low = math.floor(min(0.0, float(values.min(initial=0.0))) * 10) / 10
    counts, edges = np.histogram(np.minimum(values, 1.0), bins=BINS, range=(low, 1.0))
    most = max(int(counts.max(initial=0)), 1)
    x, y = _scale(low, 1.0), _height(0.0, most)
    bars = [
        f'<rect x="{x(a) + 0.5:.1f}" y="{y(count):.1f}" width="{x(b) - x(a) - 1:.1f}" height="{y(0) - y(count):.1f}" '
        f'fill="var(--accent)"><title>{count:,} {unit}, {a:.2f} to {b:.2f}</title></rect>'
        for count, a, b in zip(counts.tolist(), edges[:-1], edges[1:], strict=True)
        if count
    ]
    ticks = [(value, f"{value:.1f}") for value in np.arange(low, 1.01, 0.2).round(1).tolist()]
    return _svg("".join(bars), x, y, ticks, _nice(most), "cosine →")


def _recall(values: npt.NDArray[np.float32]) -> str:
    x, y = _scale(0.0, 1.0), _height(0.0, 1.0)
    at = np.linspace(0.0, 1.0, 101)
    share = [(values >= each).mean() if len(values) else 0.0 for each in at]
    points = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in zip(at, share, strict=True))
    line = f'<polyline points="{points}" fill="none" stroke="var(--accent)" stroke-width="1.6"/>'
    ticks = [(value, f"{value:.1f}") for value in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)]
    return _svg(line, x, y, ticks, [(value, f"{value:.0%}") for value in (0.0, 0.5, 1.0)], "cosine →")


def _shares(rows: Sequence[Mapping[str, Any]]) -> str:
    """A bar for each power of ten that has any known features."""
    x, y = _scale(0.0, float(max(len(rows), 1))), _height(0.0, 1.0)
    marks = []
    for index, row in enumerate(rows):
        left, width = x(index + 0.15), x(index + 0.85) - x(index + 0.15)
        told = (
            f"active on {row['fires_from']:,} to {row['fires_below'] - 1:,} rows: {row['features']:,} known features, "
            f"{row['found_90']:.1%} within 0.9, {row['found_70']:.1%} within 0.7"
        )
        marks.append(
            "".join(
                f'<rect x="{left:.1f}" y="{y(row[key]):.1f}" width="{width:.1f}" height="{y(0) - y(row[key]):.1f}" '
                f'fill="var(--accent)" opacity="{opacity}"><title>{told}</title></rect>'
                for key, opacity in (("found_70", 0.35), ("found_90", 1))
            )
        )
    ticks = [(index + 0.5, _power(row["fires_from"])) for index, row in enumerate(rows)]
    return _svg("".join(marks), x, y, ticks, [(value, f"{value:.0%}") for value in (0.0, 0.5, 1.0)], "active rows →")


def _power(least: int) -> str:
    """How a bar is called that begins there.

    >>> [_power(each) for each in (0, 1, 100, 10_000, 1_000_000)]
    ['0', '1', '100', '10k', '1M']
    """
    for unit, name in ((10**6, "M"), (10**3, "k")):
        if least >= unit:
            return f"{least // unit}{name}"
    return str(least)


def _line(at: list[float], values: list[float], marked: list[bool], label: str, note: str) -> str:
    """Values against a logarithmic axis, one of them marked and spelled out."""
    # One sparsity alone needs some axis around it.
    low, high = math.log10(min(at)) - 0.05, math.log10(max(at)) + 0.05
    linear, y = _scale(low, high), _height(0.0, max(values))

    def x(value: float) -> float:
        return linear(math.log10(value))

    order = sorted(range(len(at)), key=at.__getitem__)
    points = " ".join(f"{x(at[i]):.1f},{y(values[i]):.1f}" for i in order)
    parts = [f'<polyline points="{points}" fill="none" stroke="var(--second)" stroke-width="1.4"/>']
    for i in order:
        fill, radius = ("var(--accent)", 5.0) if marked[i] else ("var(--second)", 3.0)
        parts.append(
            f'<circle cx="{x(at[i]):.1f}" cy="{y(values[i]):.1f}" r="{radius}" fill="{fill}">'
            f"<title>{values[i]:.3g} at {at[i]:.4g}</title></circle>"
        )
        if marked[i]:
            anchor, beside = ("start", 9) if x(at[i]) < WIDTH / 2 else ("end", -9)
            across, above = x(at[i]) + beside, max(y(values[i]) - 8.0, TOP)
            if values[order[-1]] < values[order[0]]:
                # Above a line that falls there is room at its end.
                anchor, across, above = "end", float(WIDTH - RIGHT), max(y(values[i]) - 24.0, TOP)
            parts.append(
                f'<text x="{across:.1f}" y="{above:.1f}" text-anchor="{anchor}" fill="var(--accent)" '
                f'font-weight="600">{values[i]:.3g}, {note}</text>'
            )
    ticks = [(at[i], f"{at[i]:.3g}") for i in _apart([x(at[i]) for i in order], order)]
    return _svg("".join(parts), x, y, ticks, _nice(max(values)), f"{label} →")


def _apart(places: list[float], order: list[int]) -> list[int]:
    """Those of the points whose labels do not touch the one before."""
    kept, last = [], -math.inf
    for place, index in zip(places, order, strict=True):
        if place - last >= 32.0:
            kept.append(index)
            last = place
    return kept


def _scale(low: float, high: float) -> Place:
    """A value's place from left to right."""
    return lambda value: LEFT + (WIDTH - LEFT - RIGHT) * (value - low) / max(high - low, 1e-9)


def _height(low: float, high: float) -> Place:
    """A value's place from the bottom up."""
    return lambda value: HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / max(high - low, 1e-9)


def _nice(most: float) -> list[tuple[float, str]]:
    """Three or so round numbers from zero up.

    >>> _nice(11.0)
    [(0.0, '0'), (5.0, '5'), (10.0, '10')]
    """
    rough = most / 3.0
    power = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    step = next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= rough)
    return [(index * step, f"{index * step:g}") for index in range(int(most / step + 1e-9) + 1)]


def _svg(
    marks: str, x: Place, y: Place, across: Sequence[tuple[float, str]], up: Sequence[tuple[float, str]], label: str
) -> str:
    """Marks in a frame with ticks."""
    grid = "".join(
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="var(--hair)"/>'
        f'<text x="{LEFT - 7}" y="{y(value) + 4:.1f}" text-anchor="end" fill="currentColor">{text}</text>'
        for value, text in up
    )
    ticks = "".join(
        f'<line x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM + 5}" '
        'stroke="var(--second)"/>'
        f'<text x="{x(value):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle" fill="currentColor">{text}</text>'
        for value, text in across
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{label}">{grid}'
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}" stroke="var(--second)"/>'
        f'{marks}{ticks}<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end" fill="currentColor">{label}</text>'
        "</svg>"
    )
