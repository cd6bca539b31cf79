"""The report's section on known features, by itself and in a real browser."""

import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.recovery.scores import by_fires
from pipeline.report.known import Known, section
from schemas.tables import EXAMPLES, MATCHES
from tests.pipeline.report.test_page import METRICS, Scripts, drawn, feature_table, page, visible

__all__ = ["drawn"]
TOYS = [
    {
        "hook_point": f"hidden.S{sparsity}",
        "sparsity": sparsity,
        "features_per_dimension": per,
        "dimensions_per_feature": 1 / per,
    }
    for sparsity, per in ((0.0, 1.0), (0.9, 4.0), (0.99, 10.0))
]


def known_of(**changes: Any) -> Known:
    rows = [
        {
            "feature": 3 * index,
            "rank": rank,
            "known": 10 * index + rank,
            "cosine": 0.9 - 0.5 * rank,
            "known_fires": 1234,
        }
        for index in range(5)
        for rank in range(2)
    ]
    arguments: dict[str, Any] = {
        "metrics": {"mmcs_found": 0.7512, "mmcs_true": 0.6, "found": 0.5},
        "cosines_of_known": np.array([1.0, 0.95, 0.2, 0.8], np.float32),
        "by_fires": by_fires(torch.tensor([20_000, 40, 0, 31]), torch.tensor([1.0, 0.95, 0.2, 0.8]), torch.zeros(4)),
        "cosines_of_features": np.array([1.0, -0.05, 0.95], np.float32),
        "toys": (),
        "hook_point": "hidden",
        "matches": pa.Table.from_pylist(rows, MATCHES),
    }
    return Known(**(arguments | changes))


class Balanced(HTMLParser):
    """Raises where an element is closed that is not the last one opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        """It opens nothing."""


@pytest.mark.parametrize("toys", [(), TOYS])
def test_section_is_well_formed_and_says_what_was_found(toys: Any) -> None:
    made = section(known_of(toys=toys, hook_point="hidden.S0.9" if toys else "hidden"))
    parser = Balanced()
    parser.feed(made)
    assert parser.open == []
    assert "MMCS 0.751 from known features to this dictionary" in made
    assert "2 of 4 known features" in made
    assert made.count("<figure>") == 4


def test_histogram_counts_every_feature_once_and_shows_cosines_below_zero() -> None:
    made = section(known_of())
    counts = [int(count) for count in re.findall(r"<title>(\d+) known features", made)]
    assert sum(counts) == 4
    assert sum(int(count) for count in re.findall(r"<title>(\d+) features that fired", made)) == 3


def test_bars_are_known_features_by_how_often_they_are_active() -> None:
    made = section(known_of())
    bars = re.findall(r'height="([\d.]+)" fill="[^"]*" opacity="[^"]*"><title>([^<]*)</title>', made)
    assert [told for _, told in bars[::2]] == [
        "active on 0 to 0 rows: 1 known features, 0.0% within 0.9, 0.0% within 0.7",
        "active on 10 to 99 rows: 2 known features, 50.0% within 0.9, 100.0% within 0.7",
        "active on 10,000 to 99,999 rows: 1 known features, 100.0% within 0.9, 100.0% within 0.7",
    ]
    heights = [float(height) for height, _ in bars]
    # Pale, then full.
    assert heights == [0.0, 0.0, heights[4], heights[4] / 2, heights[4], heights[4]]
    assert [f">{name}</text>" in made for name in ("0", "10", "10k")] == [True] * 3
    assert "active rows" not in section(known_of(toys=TOYS, hook_point="hidden.S0.9"))


def test_figure_of_toys_marks_this_dictionarys_sparsity_and_no_other() -> None:
    made = section(known_of(toys=TOYS, hook_point="hidden.S0.9"))
    assert made.count('r="5.0"') == 2
    marked = re.findall(r'r="5\.0"[^>]*><title>([^<]*)</title>', made)
    assert marked == ["4 at 10", "0.25 at 10"]
    assert ">4, 2 found</text>" in made
    # More features per dimension lie higher up, and what is sparser farther to the right.
    places = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', made)[:3]
    across, down = [float(x) for x, _ in places], [float(y) for _, y in places]
    assert across == sorted(across)
    assert down == sorted(down, reverse=True)


def test_section_where_nothing_fired_says_so() -> None:
    made = section(known_of(metrics={}, cosines_of_features=np.zeros(0, np.float32)))
    assert "No feature fired" in made


def test_page_without_known_features_has_nothing_of_them() -> None:
    document = page()
    assert "known" not in visible(document).lower()
    assert "matches" not in Scripts(document).inlined("summary")


def test_page_in_a_browser_names_the_nearest_known_feature(drawn: Callable[[bytes, str], str]) -> None:
    metrics = METRICS | {"oracle": {"fvu": 0.01}}
    document = page(
        features=feature_table(5, False), examples=EXAMPLES.empty_table(), known=known_of(), metrics=metrics
    )
    dom = drawn(document, "#feature-6")
    assert 'data-ready="1"' in dom
    row = dom[dom.index('data-feature="6"') :].split("</tr>")[0]
    assert ">20</b>" in row
    assert "cosine 0.90, fires 1,234 times" in row
    panel = dom[dom.index('<aside id="panel"') :].split("</aside>")[0]
    assert "known feature 20" in panel
    assert "known feature 21" in panel
    assert "True directions" in dom
