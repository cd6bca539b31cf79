import hashlib
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.activations.order import (
    MIB,
    TARGET_SLABS,
    TARGET_UNITS,
    Geometry,
    choose_geometry,
    epoch_slabs,
    permutation,
    slab_order,
    unit_order,
)
from schemas.errors import ManifestError

quiet = settings(derandomize=True, deadline=None, database=None, max_examples=200)

geometries = st.builds(
    lambda rows, slabs, chunk_rows: Geometry(rows, slabs * chunk_rows, chunk_rows),
    rows=st.integers(1, 3000),
    slabs=st.integers(1, 12),
    chunk_rows=st.integers(1, 60),
)


@quiet
@given(cut=geometries)
def test_geometry_units_cover_every_row_once(cut: Geometry) -> None:
    spans = [cut.span(unit) for unit in range(cut.units)]
    assert [row for first, end in spans for row in range(first, end)] == list(range(cut.rows))
    assert all(end - first == cut.unit_rows for first, end in spans[:-1])
    assert 1 <= spans[-1][1] - spans[-1][0] <= cut.unit_rows


@quiet
@given(cut=geometries)
def test_geometry_slabs_cover_every_row_once(cut: Geometry) -> None:
    held = np.zeros(cut.rows, np.int64)
    for unit in range(cut.units):
        first, end = cut.span(unit)
        counts = cut.chunk_counts(unit)
        assert counts.shape == (cut.slabs,)
        assert counts.sum() == end - first
        assert counts.max() <= cut.chunk_rows
        # Every slab has its share of every unit.
        assert counts.max() - counts.min() <= 1
        order = unit_order(0, unit, end - first)
        held[first + order] += 1
    assert (held == 1).all()
    assert sum(cut.slab_count(slab) for slab in range(cut.slabs)) == cut.rows
    assert [cut.slab_count(slab) for slab in range(cut.slabs)] == [
        sum(int(cut.chunk_counts(unit)[slab]) for unit in range(cut.units)) for slab in range(cut.slabs)
    ]


@quiet
@given(cut=geometries)
def test_geometry_shard_positions_are_the_front_of_each_chunk(cut: Geometry) -> None:
    for unit in {0, cut.units - 1}:
        positions = cut.shard_positions(unit)
        assert len(np.unique(positions)) == len(positions) == cut.span(unit)[1] - cut.span(unit)[0]
        counts = np.bincount(positions // cut.chunk_rows, minlength=cut.slabs)
        assert counts.tolist() == cut.chunk_counts(unit).tolist()
        assert (positions % cut.chunk_rows < counts[positions // cut.chunk_rows]).all()
        assert (np.diff(positions) > 0).all()


@quiet
@given(
    rows=st.integers(1, 10**10),
    row_bytes=st.integers(2, 65_536),
    parts=st.integers(1, 20_000),
    spare=st.integers(0, 10_000),
)
def test_choose_geometry_two_slabs_fit_the_loader(rows: int, row_bytes: int, parts: int, spare: int) -> None:
    # Memory for about 1 / parts of the store, so that the number of slabs is one that can be.
    loader_memory = 2 * row_bytes * max(1, rows // parts) + spare
    cut = choose_geometry(rows, row_bytes, loader_memory)
    assert cut.unit_rows == cut.slabs * cut.chunk_rows
    assert 2 * cut.slab_count(0) * row_bytes <= loader_memory
    assert cut.slabs >= TARGET_SLABS


@quiet
@given(
    rows=st.integers(1, 10**10),
    row_bytes=st.integers(2, 65_536),
    loader_memory=st.integers(2**20, 2**36),
)
def test_choose_geometry_chunks_of_a_large_store_are_a_mebibyte(rows: int, row_bytes: int, loader_memory: int) -> None:
    cut = choose_geometry(rows, row_bytes, loader_memory)
    large = rows >= TARGET_UNITS * cut.slabs * -(-MIB // row_bytes)
    if large:
        assert cut.chunk_rows * row_bytes >= MIB
        assert cut.units >= TARGET_UNITS
    # Rows are not padded by more than the last unit's shortage: less than one row a slab and unit.
    assert cut.units * cut.unit_rows - rows < max(cut.slabs * cut.units, cut.unit_rows)


@quiet
@given(
    rows=st.integers(1, 10**7),
    row_bytes=st.integers(2, 8192),
    loader_memory=st.integers(1, 2**32),
    slabs=st.integers(1, 64),
    chunk_rows=st.integers(1, 10_000),
    fixed=st.sampled_from(["unit", "chunk", "both"]),
)
def test_choose_geometry_fixed_values_are_kept_or_refused(
    rows: int, row_bytes: int, loader_memory: int, slabs: int, chunk_rows: int, fixed: str
) -> None:
    unit = slabs * chunk_rows if fixed != "chunk" else None
    chunk = chunk_rows if fixed != "unit" else None
    try:
        cut = choose_geometry(rows, row_bytes, loader_memory, unit, chunk)
    except ManifestError:
        most = Geometry(rows, unit, 1 if chunk is None else chunk) if unit else Geometry(rows, rows, 1)
        assert 2 * most.slab_count(0) * row_bytes > loader_memory
        return
    assert unit in (None, cut.unit_rows)
    assert chunk in (None, cut.chunk_rows)
    assert cut.unit_rows == cut.slabs * cut.chunk_rows
    assert 2 * cut.slab_count(0) * row_bytes <= loader_memory


def test_choose_geometry_no_rows_is_refused() -> None:
    with pytest.raises(ManifestError, match="no rows"):
        choose_geometry(0, 64, 2**20)


def test_choose_geometry_loader_below_two_rows_is_refused_with_numbers() -> None:
    with pytest.raises(ManifestError, match=r"two rows of 1000 bytes.* loader_memory 1999") as caught:
        choose_geometry(10, 1000, 1999)
    assert "2000" in caught.value.remedy
    assert choose_geometry(10, 1000, 2000).slab_count(0) == 1


@pytest.mark.parametrize(
    ("rows", "row_bytes", "loader_memory", "unit_rows", "chunk_rows"),
    [
        (1_000_000, 768, 2**24, 4096, 2048),
        (999_999, 100, 12_345_678, 1000, 500),
        (1_000_003, 100, 1_000_000, 10, None),
        (17, 10, 100, 4, 2),
    ],
)
def test_choose_geometry_refusal_names_numbers_that_work(
    rows: int, row_bytes: int, loader_memory: int, unit_rows: int, chunk_rows: int | None
) -> None:
    with pytest.raises(ManifestError) as caught:
        choose_geometry(rows, row_bytes, loader_memory, unit_rows, chunk_rows)
    assert str(loader_memory) in caught.value.what
    found = re.fullmatch(r"raise harvest.unit_rows to (\d+), or harvest.loader_memory to (\d+)", caught.value.remedy)
    assert found is not None
    choose_geometry(rows, row_bytes, loader_memory, int(found[1]), chunk_rows)
    choose_geometry(rows, row_bytes, int(found[2]), unit_rows, chunk_rows)


@quiet
@given(count=st.integers(0, 500), key=st.lists(st.integers(0, 2**40), min_size=1, max_size=4))
def test_permutation_is_a_permutation(count: int, key: list[int]) -> None:
    found = permutation(count, *key)
    assert found.dtype == np.int64
    assert sorted(found.tolist()) == list(range(count))
    assert permutation(count, *key).tolist() == found.tolist()


def test_permutation_values_are_frozen() -> None:
    # Stores on disk are in this order. A numpy that makes another one must not be taken for the same.
    assert permutation(10, 1, 0, 0).tolist() == [6, 2, 1, 0, 8, 4, 3, 9, 7, 5]
    assert permutation(10, 3, 7, 2, 5).tolist() == [3, 8, 2, 6, 5, 1, 0, 9, 4, 7]
    assert unit_order(0, 0, 8).tolist() == [1, 7, 0, 4, 6, 3, 5, 2]
    assert unit_order(5, 1, 8).tolist() == [6, 3, 7, 0, 1, 2, 4, 5]
    assert epoch_slabs(0, 0, 8).tolist() == [2, 3, 1, 0, 4, 6, 5, 7]
    assert epoch_slabs(0, 1, 8).tolist() == [5, 6, 1, 3, 0, 4, 2, 7]
    assert slab_order(0, 0, 0, 8).tolist() == [1, 0, 2, 5, 4, 3, 7, 6]
    assert slab_order(0, 2, 3, 8).tolist() == [1, 2, 3, 0, 4, 5, 6, 7]
    large = hashlib.sha256(permutation(100_000, 1, 42, 7).astype("<i8").tobytes()).hexdigest()
    assert large == "eaf5aae7403b0641ffb5952292041d18d10497f84e7114b47a64bd9e83fc47d7"


def test_permutation_every_key_gives_another_order() -> None:
    count = 64
    orders = [
        *(unit_order(seed, unit, count) for seed in range(4) for unit in range(4)),
        *(epoch_slabs(seed, epoch, count) for seed in range(4) for epoch in range(4)),
        *(slab_order(seed, epoch, slab, count) for seed in range(4) for epoch in range(4) for slab in range(4)),
    ]
    assert len({order.tobytes() for order in orders}) == len(orders)


def test_permutation_places_are_uniform() -> None:
    # Where the first element goes over 4,000 keys: chi-squared over 10 places, 9 degrees of freedom.
    places = np.array([int(np.flatnonzero(permutation(10, 1, 0, unit) == 0)[0]) for unit in range(4000)])
    counts = np.bincount(places, minlength=10)
    assert ((counts - 400) ** 2 / 400).sum() < 27.9  # one in a thousand
