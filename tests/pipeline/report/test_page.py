"""The report page: what is in the file, and that a real browser draws it without a network."""

from __future__ import annotations

import base64
import gzip
import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.report.page import SHARD_FEATURES, render
from schemas.tables import CURVES, EXAMPLES, FEATURE_STATISTICS

HOSTILE = "</script><img src=x onerror=document.title='owned'><!--<script>"
TEXTS = ["\n", " river", " bank", HOSTILE, " <b>&amp;", "", "\u202e", " café", "\ud800", " loan"]
METRICS: dict[str, Any] = {
    "tokens": 100_000,
    "features": 600,
    "width": 64,
    "k": 32,
    "dictionary": {"fvu": 0.0812, "l0": 31.9, "dead": 0.01, "cosine": 0.97, "ce_recovered": 0.99, "kl": 0.02},
    "random": {"fvu": 0.7, "l0": 32.0, "cosine": 0.5, "ce_recovered": -0.2, "kl": 3.0},
    "pca": {"fvu": 0.4, "cosine": 0.8},
    "model": {"ce_loss": 2.25, "ce_zero": 8.1, "ce_mean": 7.2},
    "density_histogram": {"edges": [-4.0, -3.0, -2.0, -1.0], "counts": [5, 500, 40]},
}


class Scripts(HTMLParser):
    """Elements of a page as a browser's parser sees them, with the text of its scripts."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.texts: list[tuple[dict[str, str | None], str]] = []
        self._open = False
        self.feed(page.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        self._open = tag == "script"
        if self._open:
            self.texts.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        self._open = False

    def handle_data(self, data: str) -> None:
        if self._open:
            attributes, text = self.texts[-1]
            self.texts[-1] = (attributes, text + data)

    def inlined(self, name: str) -> Any:
        return json.loads(next(text for attributes, text in self.texts if attributes.get("id") == name))

    def shards(self) -> list[Any]:
        packed = [text for attributes, text in self.texts if attributes.get("class") == "shard"]
        return [json.loads(gzip.decompress(base64.b64decode(text))) for text in packed]


def feature_table(count: int, output_tokens: bool = True) -> pa.Table:
    rows = [
        {
            "feature": 3 * index,
            "fires": 1000 - index,
            "density": (1000 - index) / 1e5,
            "mean": 1.5 + index % 7,
            "std": float("nan") if index == 1 else 0.5,
            "max": 8.0,
            "decoder_norm": 1.0,
            "encoder_norm": 1.25,
            "encoder_decoder_cosine": 0.5,
            "nearest_feature": 3 * ((index + 1) % count),
            "nearest_cosine": 0.25,
            "top_tokens": [1, 3] if output_tokens else [],
            "bottom_tokens": [7] if output_tokens else [],
        }
        for index in range(count)
    ]
    return pa.Table.from_pylist(rows, FEATURE_STATISTICS)


def example_table(features: pa.Table, each: int = 3) -> pa.Table:
    rows = [
        {
            "feature": feature,
            "rank": rank,
            "row": 1000 * feature + rank,
            "activation": 8.0 - rank,
            "peak": 2,
            "tokens": [1, 0, (feature + rank) % len(TEXTS), 3, 2],
            "activations": [0.0, 0.123456, 8.0 - rank, 1.5e-5, 0.0],
        }
        for feature in features["feature"].to_pylist()
        for rank in range(each)
    ]
    return pa.Table.from_pylist(rows, EXAMPLES)


def curve_table(count: int) -> pa.Table:
    rows = [
        {
            "step": step,
            "tokens": step * 4096,
            "loss": float("nan") if step == 2 else 1 / step,
            "fvu": 0.9 / step,
            "l0": 32.0,
            "dead": 0.01,
            "aux_loss": 0.0,
            "learning_rate": 1e-4,
            "gradient_norm": 1.0,
        }
        for step in range(1, count + 1)
    ]
    return pa.Table.from_pylist(rows, CURVES)


def page(**changes: Any) -> bytes:
    features = changes.pop("features", None) or feature_table(5)
    arguments: dict[str, Any] = {
        "title": "tiny",
        "facts": {"Model": "a <model>", "F": 4096, "Expansion": 8.0, "Hook point": None},
        "metrics": METRICS,
        "curves": curve_table(20),
        "features": features,
        "examples": example_table(features),
        "norms": {"edges": [0.0, 1.0, 2.0], "counts": [3, 9]},
        "token_text": TEXTS.__getitem__,
        "shown_of": features.num_rows,
    }
    return render(**(arguments | changes))


def visible(document: bytes) -> str:
    body = re.sub(r"<(script|style)\b.*?</\1>", "", document.decode(), flags=re.DOTALL)
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body)))


def test_render_same_inputs_in_another_order_gives_same_bytes() -> None:
    features = feature_table(5)
    examples = example_table(features)
    backwards = pa.array(range(examples.num_rows - 1, -1, -1))
    again = page(features=features.take(pa.array([4, 2, 0, 1, 3])), examples=examples.take(backwards))
    assert page(features=features, examples=examples) == again


def test_render_at_another_time_gives_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = page()
    with monkeypatch.context() as patched:
        patched.setattr("time.time", lambda: 1e9)
        assert page() == now


def test_render_hostile_tokens_stay_inert() -> None:
    plain = Scripts(page(token_text=lambda token: "x"))
    hostile = Scripts(page(token_text=lambda token: HOSTILE, title=HOSTILE, facts={HOSTILE: HOSTILE}))
    assert [tag for tag in hostile.tags if tag not in ("div", "dt", "dd")] == [
        tag for tag in plain.tags if tag not in ("div", "dt", "dd")
    ]
    assert "img" not in hostile.tags
    assert set(hostile.inlined("vocabulary")["text"]) == {HOSTILE}


def test_render_loads_nothing_from_outside() -> None:
    document = page()
    assert Scripts(document).addresses == []
    assert not re.search(r"@import|url\(", document.decode().split("</style>")[0])


def test_render_payload_decodes_to_the_same_examples() -> None:
    features = feature_table(SHARD_FEATURES + 3)
    examples = example_table(features)
    found = Scripts(page(features=features, examples=examples))
    ids, summary = found.inlined("vocabulary")["id"], found.inlined("summary")
    assert found.inlined("vocabulary")["text"] == [TEXTS[token] for token in ids]
    assert [len(shard) for shard in found.shards()] == [SHARD_FEATURES, 3]

    decoded = []
    records = [record for shard in found.shards() for record in shard]
    for feature, (promoted, suppressed, kept) in zip(summary["columns"]["feature"], records, strict=True):
        assert [[ids[place] for place in tokens] for tokens in (promoted, suppressed)] == [[1, 3], [7]]
        for rank, row, activation, peak, tokens, activations in kept:
            decoded.append((feature, rank, row, activation, peak, [ids[place] for place in tokens], activations))
    rounded = [[0, 0.123, 8 - rank, 1.5e-5, 0] for rank in (0, 1, 2)] * features.num_rows
    expected = [(*list(row.values())[:6], values) for row, values in zip(examples.to_pylist(), rounded, strict=True)]
    assert decoded == expected


def test_render_summary_snippet_is_the_strongest_example() -> None:
    found = Scripts(page())
    peak, tokens, shades = found.inlined("summary")["snippet"][1]
    ids = found.inlined("vocabulary")["id"]
    assert (peak, [ids[place] for place in tokens], shades) == (2, [1, 0, 3, 3, 2], "01910")


def test_render_feature_without_examples_has_no_snippet() -> None:
    features = feature_table(2)
    found = Scripts(page(features=features, examples=example_table(features.slice(0, 1))))
    assert found.inlined("summary")["snippet"][1] is None
    assert found.shards()[0][1][2] == []


def test_render_without_language_model_shows_no_loss() -> None:
    metrics = METRICS | {"dictionary": {"fvu": 0.1, "output_cosine": 0.93}, "random": {"fvu": 0.7}, "model": {}}
    del metrics["pca"]
    text = visible(page(metrics=metrics))
    assert "Output cosine" in text
    assert "0.930" in text
    for absent in ("CE recovered", "KL", "PCA", "For reference"):
        assert absent not in text


def test_render_with_no_metrics_at_all_still_shows_features() -> None:
    found = page(metrics={}, norms={"edges": [], "counts": []}, curves=curve_table(0))
    assert "Beside baselines" not in visible(found)
    assert len(Scripts(found).inlined("summary")["columns"]["feature"]) == 5


def test_render_without_baselines_does_not_speak_of_them() -> None:
    text = visible(page(metrics={"dictionary": METRICS["dictionary"]}))
    assert "No baseline was measured" in text
    assert "Beside baselines" not in text
    assert "in bold" not in text


def test_render_comparison_marks_the_better_value() -> None:
    best = re.findall(r'<td class="best">([^<]+)', page().decode())
    assert best == ["0.0812", "99.0\u202f%", "0.0200", "0.970"]


def test_render_subset_says_how_many_of_all() -> None:
    assert "5 of 4,096 features are in this report" in visible(page(shown_of=4096))
    assert "All 5 features" in visible(page())


def test_render_long_curve_is_thinned_and_keeps_its_end() -> None:
    charts = Scripts(page(curves=curve_table(4001))).inlined("charts")
    assert charts["every"] == {"steps": 3}
    assert len(charts["curves"]["tokens"]) == 1334
    assert charts["curves"]["tokens"][-1] == 4001 * 4096


def test_render_values_that_are_not_finite_become_gaps() -> None:
    found = Scripts(page())
    assert found.inlined("charts")["curves"]["loss"][1] is None
    assert found.inlined("summary")["columns"]["std"][1] is None


@pytest.fixture
def drawn(tmp_path: Path) -> Callable[[bytes, str], str]:
    """Opens a page from the disk in a headless browser and returns the document it ends up with."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs a browser: there is no `chromium` on the PATH")

    def draw(document: bytes, fragment: str) -> str:
        file = tmp_path / "report.html"
        file.write_bytes(document)
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
        flags += ["--disable-background-networking", "--disable-component-update", "--virtual-time-budget=20000"]
        command = [chromium, *flags, "--dump-dom", f"--user-data-dir={tmp_path / 'profile'}", file.as_uri() + fragment]
        return subprocess.run(command, capture_output=True, timeout=120, check=True).stdout.decode()

    return draw


def test_page_in_a_browser_draws_table_plots_and_panel(drawn: Callable[[bytes, str], str]) -> None:
    dom = drawn(page(features=feature_table(60)), "#feature-9")
    assert 'data-ready="1"' in dom
    assert "<title>tiny · Kilobasis</title>" in dom
    assert dom.count('<tr role="row" data-feature=') == 50
    assert dom.count("<svg") >= 8
    panel = dom[dom.index('<aside id="panel"') :].split("</aside>")[0]
    assert " hidden" not in panel.split(">")[0]
    assert "Feature 9" in panel
    assert panel.count('<li><div class="value">') == 3
    assert html.escape(HOSTILE, quote=False) in panel
    assert not re.search(r"<img|<title>owned", dom)


def test_page_in_a_browser_without_fragment_leaves_panel_closed(drawn: Callable[[bytes, str], str]) -> None:
    features = feature_table(2, output_tokens=False)
    dom = drawn(page(features=features, metrics={}, curves=curve_table(1)), "")
    assert 'data-ready="1"' in dom
    assert re.search(r'<aside id="panel"[^>]* hidden', dom)
    assert dom.count('<tr role="row" data-feature=') == 2
