"""The true code of rows, compressed by row."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.synthetic.rows import Active

entries = st.sets(st.tuples(st.integers(0, 9), st.integers(0, 6))).map(sorted)


def active_of(pairs: list[tuple[int, int]], order: np.random.Generator | None = None) -> Active:
    found = np.array(pairs, np.int64).reshape(-1, 2)
    if order is not None:
        found = found[order.permutation(len(found))]
    return Active.of(10, found[:, 0], found[:, 1], found[:, 0] * 10.0 + found[:, 1])


@given(entries, st.integers(0, 2**32))
def test_code_is_sorted_whatever_the_order_of_its_entries(pairs: list[tuple[int, int]], seed: int) -> None:
    active = active_of(pairs, np.random.default_rng(seed))
    assert list(zip(active.rows().tolist(), active.feature_E.tolist(), strict=True)) == pairs
    assert active.value_E.tolist() == [row * 10.0 + feature for row, feature in pairs]
    assert len(active) == 10


@given(entries, st.integers(0, 10), st.integers(0, 10))
def test_code_cut_and_joined_is_the_whole(pairs: list[tuple[int, int]], one: int, other: int) -> None:
    whole, (low, high) = active_of(pairs), sorted((one, other))
    parts = [whole.sliced(0, low), whole.sliced(low, high), whole.sliced(high, 10)]
    assert [len(part) for part in parts] == [low, high - low, 10 - high]
    joined = Active.joined(parts)
    assert joined.start_N1.tolist() == whole.start_N1.tolist()
    assert joined.feature_E.tolist() == whole.feature_E.tolist()
    assert parts[1].rows().tolist() == [row - low for row, _ in pairs if low <= row < high]
