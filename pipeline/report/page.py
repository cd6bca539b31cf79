"""The report of one dictionary: a single HTML file that opens from a disk, with no server and no network.

The page has three layers, so that each part costs only when it is looked at. Figures, tiles and the table of
baselines are plain HTML. One row per feature, with a snippet of its strongest example, is inlined as JSON.
Everything else about the features lies in gzipped shards that the browser unpacks when a feature is opened or
searched for. Token texts are stored once, in a vocabulary that rows and shards point into.

A token's text is whatever was in the corpus, so it is treated as hostile: it reaches the page only inside JSON
without a single `<`, is only ever shown through text nodes, and a content security policy that names the page's own
three scripts by hash leaves anything that should slip through unable to run, or to load anything.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
import pyarrow as pa
from markupsafe import Markup

from pipeline.report.known import Known, section
from pipeline.report.numbers import BARS, BASELINES, METRICS, ORACLE, REFERENCES, TILES, Metric

SHARD_FEATURES = 256
"""Features in a shard: small enough to open one at once, large enough to compress well."""

CURVE_POINTS = 1500
"""Points drawn of a training curve; more than a screen is wide, and SVG grows slow beyond."""

SNIPPET_BEFORE, SNIPPET_AFTER = 9, 9
"""Tokens shown left and right of the peak in the feature table."""

VENDORED = ("d3-7.9.2.min.js", "plot-0.6.17.umd.min.js")
LICENCES = ("d3-LICENSE.txt", "plot-LICENSE.txt")
"""The licences ask to travel with every copy, and each report is one."""

MISSING = "\N{EM DASH}"


CURVE_COLUMNS = ("loss", "fvu", "dead", "learning_rate")
SUMMARY_COLUMNS = (
    "feature",
    "fires",
    "density",
    "mean",
    "std",
    "max",
    "decoder_norm",
    "encoder_norm",
    "encoder_decoder_cosine",
    "nearest_feature",
    "nearest_cosine",
)


def render(
    title: str,
    facts: Mapping[str, Any],
    metrics: Mapping[str, Any],
    curves: pa.Table,
    features: pa.Table,
    examples: pa.Table,
    norms: Mapping[str, Sequence[float]],
    token_text: Callable[[int], str],
    shown_of: int,
    known: Known | None = None,
) -> bytes:
    """Draws the report of one dictionary.

    The bytes depend on the arguments alone: there is no time stamp in them and nothing random.

    Args:
        title: Name of the dictionary.
        facts: Label -> value, shown in this order: model, hook point, d, F, k, tokens trained, and the like.
        metrics: What `metrics.json` holds. Absent keys and absent baselines are left out of the page.
        curves: Training curves, as `schemas.tables.CURVES`.
        features: The features to show, as `schemas.tables.FEATURE_STATISTICS`, in any order.
        examples: Their examples, as `schemas.tables.EXAMPLES`, in any order.
        norms: `edges` (n + 1) and `counts` (n) of the L2 norms of the activation rows.
        token_text: Token id -> its text, any text at all.
        shown_of: F. Where `features` has fewer rows, the page says how many it shows.
        known: What is known of the features of a synthetic source.

    Returns:
        The page, UTF-8.
    """
    ordered = features.sort_by([("density", "descending"), ("feature", "ascending")])
    grouped = _examples_by_feature(examples)
    statistics = ordered.select([*SUMMARY_COLUMNS, "top_tokens", "bottom_tokens"]).to_pydict()
    vocabulary = _Vocabulary.of(grouped, [*statistics["top_tokens"], *statistics["bottom_tokens"]])

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["digest"] = _digest
    page = environment.from_string(_asset("report.html")).render(
        title=title,
        facts=[(label, _fact(value)) for label, value in facts.items()],
        tiles=_tiles(metrics),
        comparison=_comparison(metrics),
        references=_references(metrics),
        shown=ordered.num_rows,
        shown_of=shown_of,
        density_counted=_counted(metrics.get("density_histogram")),
        evaluated=_finite(metrics.get("tokens")),
        charts=_inline(_charts(metrics, curves, norms)),
        known=None if known is None else section(known),
        vocabulary=_inline({"id": vocabulary.ids, "text": [token_text(token) for token in vocabulary.ids]}),
        summary=_inline(_summary(statistics, grouped, vocabulary) | _matches(statistics["feature"], known)),
        shards=_shards(statistics, grouped, vocabulary),
        vendored=[_script(_asset(f"vendor/{name}")) for name in VENDORED],
        licences=[_asset(f"vendor/{name}") for name in LICENCES],
    )
    return page.encode()


# ---------------------------------------------------------------- figures that are plain HTML


def _tiles(metrics: Mapping[str, Any]) -> list[dict[str, str]]:
    """The headline numbers of the dictionary, as many as there are."""
    ours = metrics.get("dictionary") or {}
    by_key = {metric.key: metric for metric in METRICS}
    return [
        {"label": by_key[key].label, "value": _shown(ours[key], by_key[key].style), "reading": by_key[key].reading}
        for key in TILES
        if _finite(ours.get(key)) is not None
    ]


def _comparison(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Rows of the table that sets the dictionary beside the baselines; only what was measured is in it.

    The best cell of a row is marked where the row has a better direction and something to compare with.
    """
    names = {
        "dictionary": "This dictionary",
        "parents": "Its parents alone",
        "pca": _pca_name(metrics),
        "random": "Random dictionary",
        ORACLE: "True directions",
    }
    columns = [name for name in (*BASELINES, ORACLE) if metrics.get(name)]
    known = {metric.key for metric in METRICS}
    extra = sorted({key for name in columns for key in metrics[name]} - known)
    rows = []
    for metric in (*METRICS, *(Metric(key, key, "number", None, "") for key in extra)):
        values = [_finite(metrics[name].get(metric.key)) for name in columns]
        present = [value for value in values if value is not None]
        if not present:
            continue
        best = None
        if metric.better and len(present) > 1:
            best = min(present) if metric.better == "lower" else max(present)
        cells = [{"text": _shown(value, metric.style), "best": best is not None and value == best} for value in values]
        rows.append({"label": metric.label, "better": metric.better, "reading": metric.reading, "cells": cells})
    return {"columns": [names[name] for name in columns], "rows": rows}


def _pca_name(metrics: Mapping[str, Any]) -> str:
    k = _finite(metrics.get("k"))
    return "PCA" if k is None else f"PCA, {_fact(metrics['k'])} components"


def _references(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The model's own losses, which say what recovering all or nothing would mean."""
    model = metrics.get("model") or {}
    return [(label, _shown(model[key], "number")) for key, label in REFERENCES if _finite(model.get(key)) is not None]


def _counted(histogram: Mapping[str, Sequence[float]] | None) -> int | None:
    return int(sum(histogram["counts"])) if histogram else None


def _shown(value: object, style: str) -> str:
    """A metric in three significant digits, or a dash where there is none."""
    number = _finite(value)
    if number is None:
        return MISSING
    if style == "fraction":
        return f"{_plain(100 * number)}\N{NARROW NO-BREAK SPACE}%"
    return _plain(number)


def _plain(number: float) -> str:
    if number == 0:
        return "0"
    if not 1e-4 <= abs(number) < 1e6:
        return f"{number:.2e}".replace("-", "\N{MINUS SIGN}")
    decimals = max(0, 2 - math.floor(math.log10(abs(number))))
    return f"{number:,.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def _fact(value: object) -> str:
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.6g}"
    return str(value)


# ---------------------------------------------------------------- data for the browser


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """The token ids that occur, ascending, and the place of each: what rows and shards point into."""

    ids: list[int]
    place: dict[int, int]

    @classmethod
    def of(cls, grouped: Mapping[int, list[dict[str, Any]]], lists: list[list[int]]) -> _Vocabulary:
        """Collects the tokens of all examples and of `lists`."""
        seen = {token for tokens in lists for token in tokens}
        for found in grouped.values():
            for example in found:
                seen.update(example["tokens"])
        ids = sorted(seen)
        return cls(ids, {token: place for place, token in enumerate(ids)})

    def places(self, tokens: Sequence[int]) -> list[int]:
        """Places of `tokens`, in their order."""
        return [self.place[token] for token in tokens]


def _examples_by_feature(examples: pa.Table) -> dict[int, list[dict[str, Any]]]:
    """Examples of each feature, by rank."""
    grouped: dict[int, list[dict[str, Any]]] = {}
    for example in examples.sort_by([("feature", "ascending"), ("rank", "ascending")]).to_pylist():
        grouped.setdefault(example["feature"], []).append(example)
    return grouped


def _charts(
    metrics: Mapping[str, Any], curves: pa.Table, norms: Mapping[str, Sequence[float]]
) -> dict[str, dict[str, Any] | list[Any] | None]:
    """What the plots draw. Long curves are thinned evenly; `every` says to what, for the caption."""
    every = max(1, math.ceil(curves.num_rows / CURVE_POINTS))
    # Counted back from the end, so that the last point, the one that is quoted, is always there.
    kept = list(range(curves.num_rows - 1, -1, -every))[::-1]
    thinned = curves.select(["tokens", *CURVE_COLUMNS]).take(pa.array(kept, pa.int64())).to_pydict()
    bars = []
    for metric in METRICS:
        if metric.key in BARS:
            values = {name: _rounded((metrics.get(name) or {}).get(metric.key), 4) for name in BASELINES}
            bars.append({"label": metric.label, "style": metric.style, "better": metric.better, **values})
    return {
        "every": {"steps": every},
        "curves": {
            "tokens": thinned["tokens"],
            **{name: [_rounded(value, 5) for value in thinned[name]] for name in CURVE_COLUMNS},
        },
        "bars": [bar for bar in bars if bar["dictionary"] is not None],
        "density": _histogram(metrics.get("density_histogram")),
        "norms": _histogram(norms),
    }


def _histogram(found: Mapping[str, Sequence[float]] | None) -> dict[str, list[Any]] | None:
    if not found or not found.get("counts"):
        return None
    return {"edges": [_rounded(edge, 5) for edge in found["edges"]], "counts": [int(n) for n in found["counts"]]}


def _summary(
    statistics: Mapping[str, list[Any]], grouped: Mapping[int, list[dict[str, Any]]], vocabulary: _Vocabulary
) -> dict[str, Any]:
    """Columns of the feature table. `snippet` is `[peak, tokens, shades]`, a shade being a digit out of nine."""
    columns = {name: [_rounded(value, 4) for value in statistics[name]] for name in SUMMARY_COLUMNS}
    columns["feature"], columns["nearest_feature"] = statistics["feature"], statistics["nearest_feature"]
    columns["fires"] = statistics["fires"]
    snippets = []
    for feature, highest in zip(statistics["feature"], statistics["max"], strict=True):
        found = grouped.get(feature)
        snippets.append(_snippet(found[0], highest, vocabulary) if found else None)
    return {"shard": SHARD_FEATURES, "columns": columns, "snippet": snippets}


def _snippet(example: Mapping[str, Any], highest: float, vocabulary: _Vocabulary) -> list[Any]:
    peak = example["peak"]
    start, stop = max(0, peak - SNIPPET_BEFORE), peak + SNIPPET_AFTER + 1
    # An example may come from another split than the statistics, so the feature's maximum need not bound it.
    scale = max(_finite(highest) or 0.0, _finite(example["activation"]) or 0.0) or 1.0
    values = [_finite(value) or 0.0 for value in example["activations"][start:stop]]
    shades = [0 if value <= 0 else min(9, max(1, round(9 * value / scale))) for value in values]
    return [peak - start, vocabulary.places(example["tokens"][start:stop]), "".join(map(str, shades))]


def _shards(
    statistics: Mapping[str, list[Any]], grouped: Mapping[int, list[dict[str, Any]]], vocabulary: _Vocabulary
) -> list[str]:
    """All that the detail panel needs, gzipped and in base64, `SHARD_FEATURES` to a shard in table order.

    A feature is `[promoted, suppressed, examples]`, an example `[rank, row, activation, peak, tokens, activations]`.
    """
    records = []
    for feature, promoted, suppressed in zip(
        statistics["feature"], statistics["top_tokens"], statistics["bottom_tokens"], strict=True
    ):
        found = [
            [
                example["rank"],
                example["row"],
                _rounded(example["activation"], 3),
                example["peak"],
                vocabulary.places(example["tokens"]),
                [_rounded(value, 3) for value in example["activations"]],
            ]
            for example in grouped.get(feature, [])
        ]
        records.append([vocabulary.places(promoted), vocabulary.places(suppressed), found])
    slices = [records[start : start + SHARD_FEATURES] for start in range(0, len(records), SHARD_FEATURES)]
    return [base64.b64encode(gzip.compress(_compact(part).encode(), 9, mtime=0)).decode() for part in slices]


def _matches(features: Sequence[int], known: Known | None) -> dict[str, Any]:
    """For every feature shown its nearest known features, as `[feature, cosine, fires]`."""
    if known is None:
        return {}
    found: dict[int, list[list[Any]]] = {}
    for match in known.matches.sort_by([("feature", "ascending"), ("rank", "ascending")]).to_pylist():
        found.setdefault(match["feature"], []).append(
            [match["known"], _rounded(match["cosine"], 4), match["known_fires"]]
        )
    return {"matches": [found.get(feature, []) for feature in features]}


# ---------------------------------------------------------------- encoding


def _finite(value: object) -> float | None:
    """`value` as a number, or None where there is none to show."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _rounded(value: object, digits: int) -> float | int | None:
    """`value` in `digits` significant digits; whole numbers as integers, which JSON writes shorter."""
    number = _finite(value)
    if not number:
        return None if number is None else 0
    short = float(f"{number:.{digits}g}")
    return int(short) if short.is_integer() else short


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _inline(value: object) -> Markup:
    """JSON that cannot end the script element it stands in, nor open a comment there."""
    return Markup(_compact(value).replace("<", "\\u003c"))  # noqa: S704 - no markup can be left in it


def _script(source: str) -> Markup:
    """A vendored script, checked to hold nothing that would end its element early."""
    lowered = source.lower()
    if "</script" in lowered or "<!--" in lowered:
        raise ValueError("a vendored script holds a tag that would end its script element")
    return Markup(source)  # noqa: S704 - checked above


def _digest(script: str) -> str:
    """The hash by which the content security policy admits `script`."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text("utf-8")
