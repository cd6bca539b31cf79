"""Events as numbers: the same names for every reader, and curves that go on where an earlier run ended."""

from jobs.scalars import Point, Scalars, StoreRates
from schemas import events


def test_units_count_on_from_those_that_were_committed_earlier() -> None:
    scalars = Scalars()
    assert scalars(events.StageStarted("harvest", 7, 9, "harvest/abc")) == []
    scalars(events.UnitCommitted("harvest", "000007", 10, 2.0, 100))
    points = scalars(events.UnitCommitted("harvest", "000008", 30, 2.0, 100))
    assert points == [
        Point("harvest", "rows_per_second", 9, 15.0),
        Point("harvest", "unit_seconds", 9, 2.0),
        Point("harvest", "peak_memory_bytes", 9, 100.0),
    ]


def test_training_keeps_its_own_steps() -> None:
    scalars = Scalars()
    assert scalars(events.Progress("train/a", 40, 1, 2, {"fvu": 0.5})) == [Point("train/a", "fvu", 40, 0.5)]
    assert scalars(events.QueueChanged("train/a", 3, 2))[0] == Point("train/a", "units_waiting", 40, 3.0)


def test_what_a_store_gave_is_added_up_for_each_stage() -> None:
    scalars = Scalars()
    scalars(events.StoreUsed("harvest", 100, 10, 1))
    scalars(events.StoreUsed("train/a", 5, 5, 5))
    values = {point.name: point.value for point in scalars(events.StoreUsed("harvest", 20, 2, 0))}
    assert values == {"store_read_bytes": 120, "store_written_bytes": 12, "store_retries": 1}


def test_rates_are_those_since_they_were_last_told() -> None:
    rates = StoreRates(100.0)
    rates.take(110.0, events.StoreUsed("harvest", 1000, 100, 1))
    assert (rates.read, rates.written, rates.retries) == (100.0, 10.0, 1)
    rates.take(112.0, events.StoreUsed("harvest", 1000, 0, 2))
    assert (rates.read, rates.written, rates.retries) == (500.0, 0.0, 3)
