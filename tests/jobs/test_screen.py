"""`top`: what an operator sees of a run, from its root alone."""

import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from cluster.storage.create import create
from cluster.storage.path import StoragePath
from jobs.event_log import Piece, pieces_of
from jobs.screen import View, curve, picture, watch
from schemas import events
from schemas.errors import ManifestError
from schemas.records import RootRecord
from tests.support.command import invoke
from tests.support.roots import dead_process, lose_last_word, newest

NOW = 1_800_000_000.0


def seen(view: View, now: float = NOW) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(picture(view, now))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


class Told:
    """A root with one run, whose events are written segment by segment."""

    def __init__(self, folder: Path) -> None:
        self.root = StoragePath.parse(str(folder / "root"))
        create(self.root / "ROOT.json", RootRecord(name="told", creates="atomic").body())
        self.run, self._segments = self.root / "runs" / "20270101T000000.000000Z-aaaaaa", 0

    def tell(self, *told: tuple[float, events.Event]) -> None:
        lines = [events.line(event, when) for when, event in told]
        create(self.run / "events" / f"{self._segments:06d}.jsonl", "\n".join(lines).encode())
        self._segments += 1


@pytest.fixture
def told(tmp_path: Path) -> Told:
    return Told(tmp_path)


def test_finished_run_shows_its_stages_numbers_and_curve(finished: SimpleNamespace) -> None:
    result = invoke("top", finished.manifest, "--once")
    assert result.code == 0, result.err
    for stage in ("tokenize", "harvest", "train/tiny", "evaluate/tiny", "catalog/tiny", "export/tiny"):
        assert any(stage in line and "committed in" in line for line in result.out.splitlines())
    assert "FVU so far" in result.out
    assert "3 / 3" in result.out


def test_root_is_enough(finished: SimpleNamespace) -> None:
    assert "committed in" in invoke("top", finished.root, "--once").out


def test_run_whose_driver_is_dead_has_stopped(copied: SimpleNamespace) -> None:
    run = newest(copied.root)
    noted = run / "process.json"
    noted.write_text(json.dumps(json.loads(noted.read_text()) | {"pid": dead_process()}))
    for segment in sorted((run / "events").iterdir())[1:]:
        segment.unlink()
    first = sorted((run / "events").iterdir())[0]
    lines = first.read_text().splitlines()
    begun = next(at for at, line in enumerate(lines) if json.loads(line)["event"] == "StageStarted")
    first.write_text("\n".join(lines[: begun + 1]))
    shown = invoke("top", copied.root, "--once").out
    assert "not running" in shown
    assert any("tokenize" in line and "stopped" in line for line in shown.splitlines())
    assert any("train/tiny" in line and "waiting" in line for line in shown.splitlines())


def test_pace_and_time_left_are_those_of_late(told: Told) -> None:
    told.tell(
        (NOW - 1000, events.StageStarted("harvest", 0, 100, "harvest/abc")),
        (NOW - 990, events.UnitCommitted("harvest", "0", 10, 1.0, 2**20)),
    )
    units = [
        (NOW - 40 + 10 * at, events.UnitCommitted("harvest", str(at), 5000, 20.0, 3 * 2**20)) for at in range(1, 5)
    ]
    told.tell(*units)
    stage = View(told.root).stages["harvest"]
    assert (stage.done, stage.total, stage.peak_memory) == (5, 100, 3 * 2**20)
    # Four units of 20 s in the 50 s since the first of them began.
    assert stage.pace(NOW) == (pytest.approx(20_000 / 50), "rows/s")
    assert stage.busy(NOW) == pytest.approx(80 / 50)
    # A unit every 10 s, of 95 that are left.
    assert stage.left(NOW) == pytest.approx(950)


def test_pace_of_a_run_that_hangs_falls(told: Told) -> None:
    told.tell((NOW - 50, events.StageStarted("harvest", 0, 9, "harvest/abc")))
    told.tell((NOW - 50, events.UnitCommitted("harvest", "0", 1000, 5.0, 0)))
    stage = View(told.root).stages["harvest"]
    paces = [stage.pace(NOW - 50 + waited) for waited in (0, 10, 40)]
    assert [round(pace[0]) for pace in paces if pace] == [200, 67, 22]


def test_training_shows_its_scalars_and_its_own_pace(told: Told) -> None:
    told.tell((NOW - 30, events.StageStarted("train/a", 0, 4000, "train/abc")))
    for at in range(1, 4):
        scalars = {"fvu": 0.5 / at, "dead": 0.01, "tokens_per_second": 50.0, "memory_bytes": 2.0**30}
        told.tell((NOW - 30 + at, events.Progress("train/a", at, 1000 * at, 4000, scalars)))
    told.tell((NOW - 1, events.CheckpointCommitted("train/a", 3, 0.5)))
    view = View(told.root)
    shown = seen(view)
    for expected in ("50 tokens/s", "20 s", "3,000 / 4,000", "0.1667", "1.0%", "1.0 GiB", "checkpoint at step 3"):
        assert expected in shown
    assert list(view.stages["train/a"].curve) == [0.5, 0.25, pytest.approx(0.5 / 3)]


def test_stage_shows_what_waits_and_what_its_store_gives_and_takes(told: Told) -> None:
    told.tell(
        (NOW - 20, events.StageStarted("harvest", 0, 9, "harvest/abc")),
        (NOW - 20, events.QueueChanged("harvest", 7, 2)),
        (NOW - 10, events.StoreUsed("harvest", 10 * 2**20, 20 * 2**20, 3)),
    )
    view = View(told.root)
    head, row = [line.split() for line in seen(view).splitlines() if line.strip().startswith(("stage", "harvest"))]
    assert head == ["stage", "state", "done", "waiting", "store", "in", "out", "repeated"]
    assert row[-6:] == ["7", "1.0", "MiB/s", "2.0", "MiB/s", "3"]
    # Nothing waits or flows where nothing runs.
    told.tell((NOW, events.StageCommitted("harvest", 20.0, "d" * 64, "harvest/abc")))
    view.look()
    assert "MiB/s" not in seen(view)


def test_trouble_is_counted_and_told(told: Told) -> None:
    told.tell(
        (NOW - 9, events.StageStarted("harvest", 0, 9, "harvest/abc")),
        (NOW - 8, events.WorkerLost("harvest", "SIGKILL", 1, "000003")),
        (NOW - 7, events.UnitFailed("harvest", "000004", "boom", 1, 3, "")),
        (NOW - 6, events.Note("harvest", "hostile \x1b[31m[bold]markup[/bold]")),
    )
    shown = seen(View(told.root))
    row = next(line for line in shown.splitlines() if line.strip().startswith("harvest") and "running" in line)
    assert row.split()[-2:] == ["1", "1"]
    assert "lost a worker with 000003 (SIGKILL)" in shown
    assert "boom" in shown
    # What somebody else wrote neither is markup nor drives the terminal.
    assert "[bold]markup[/bold]" in shown
    assert "\x1b" not in shown


def test_names_of_stages_are_no_markup(told: Told) -> None:
    for name in ("x[/nope]", "[link=http://evil.invalid]x[/link]", "bell\x07"):
        told.tell((NOW - 9, events.StageStarted(name, 0, 9, "harvest/abc")))
        told.tell((NOW - 8, events.Progress(name, 1, 1, 9, {"fvu": 0.5})))
    shown = seen(View(told.root))
    assert "x[/nope]" in shown
    assert "[link=http://evil.invalid]x[/link]" in shown
    assert not {"\x1b", "\x07"} & set(shown)


def test_numbers_that_are_none_say_nothing(told: Told) -> None:
    told.tell((NOW - 9, events.StageStarted("train/a", 0, 9, "train/abc")))
    for when, number in ((NOW, float("nan")), (NOW, float("inf")), (1e20, 0.5), (-1.0, 0.5)):
        told.tell((when, events.Progress("train/a", 1, 1, 9, {"fvu": number, "tokens_per_second": number})))
    for number in (10**400, -(10**400), float("inf")):
        told.tell((NOW, events.Progress("train/a", number, number, 9, {})))  # type: ignore[arg-type]
    view = View(told.root)
    assert not view.stages["train/a"].curve
    assert "train/a" in seen(view)


def test_pace_of_long_units_stays_and_that_of_a_hang_goes_on_falling(told: Told) -> None:
    told.tell((NOW, events.StageStarted("harvest", 0, 9, "harvest/abc")))
    told.tell(*((NOW + 100 * at, events.UnitCommitted("harvest", str(at), 1000, 100.0, 0)) for at in (1, 2, 3)))
    stage = View(told.root).stages["harvest"]
    paces = [stage.pace(NOW + 300 + waited) for waited in (70, 190, 250, 1000)]
    rates = [round(pace[0], 2) for pace in paces if pace]
    assert rates[:2] == [10.0, 10.0]
    assert rates[1] > rates[2] > rates[3]
    # Whoever looks may have a clock that is behind.
    busy = stage.busy(NOW + 290)
    assert busy is not None
    assert busy == pytest.approx(1.0)


def test_run_that_found_another_one_at_work_is_not_looked_at(copied: SimpleNamespace) -> None:
    first = newest(copied.root)
    refused = first.parent / "29990101T000000.000000Z-ffffff"
    refused.mkdir()
    for name in ("manifest.json", "process.json"):
        (refused / name).write_text((first / name).read_text())
    note = json.loads((refused / "process.json").read_text())
    lose_last_word(first)
    (first / "process.json").write_text(json.dumps(note))
    (refused / "process.json").write_text(json.dumps(note | {"pid": dead_process()}))
    assert View(StoragePath.parse(str(copied.root))).run == first.name


def test_look_reads_only_what_is_new(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    told.tell((NOW - 9, events.StageStarted("harvest", 0, 9, "harvest/abc")))
    view, read = View(told.root), list[str]()

    def counted(run: StoragePath, start: int) -> Iterator[tuple[Piece, object]]:
        for piece, found in pieces_of(run, start):
            read.append(piece.name)
            yield piece, found

    monkeypatch.setattr("jobs.screen.pieces_of", counted)
    view.look()
    assert read == []
    told.tell((NOW - 8, events.UnitCommitted("harvest", "0", 10, 1.0, 0)))
    view.look()
    assert read == ["000001.jsonl"]
    assert view.stages["harvest"].done == 1


def test_new_run_takes_the_place_of_the_old_one(told: Told) -> None:
    told.tell((NOW - 9, events.StageStarted("harvest", 0, 9, "harvest/abc")))
    view = View(told.root)
    told.run, told._segments = told.root / "runs" / "20270102T000000.000000Z-bbbbbb", 0
    told.tell((NOW - 1, events.StageCommitted("harvest", 1.0, "d" * 64, "harvest/abc", skipped=True)))
    view.look()
    assert view.run.endswith("bbbbbb")
    assert view.stages["harvest"].state == "committed"
    # What was done earlier did not happen now.
    assert not view.happened


def test_watch_looks_again_and_again(told: Told) -> None:
    told.tell((time.time(), events.StageStarted("harvest", 0, 9, "harvest/abc")))
    looks = []

    def ended() -> bool:
        told.tell((time.time(), events.UnitCommitted("harvest", str(len(looks)), 10, 1.0, 0)))
        looks.append(1)
        return len(looks) > 3

    console = Console(file=io.StringIO(), force_terminal=True, width=160, legacy_windows=False)
    watch(told.root, console, 0.01, ended)
    # In a pipe nobody would see anything before the end, which never comes.
    watch(told.root, Console(file=io.StringIO(), width=160), 0.01)
    assert isinstance(console.file, io.StringIO)
    assert "3 / 9" in console.file.getvalue()


@pytest.mark.parametrize("what", ["nothing", "no-root", "no-run"])
def test_there_is_nothing_to_watch(what: str, tmp_path: Path) -> None:
    if what == "no-root":
        (tmp_path / "file").write_text("x")
    root = tmp_path / "none" if what == "nothing" else tmp_path
    if what == "no-run":
        create(StoragePath.parse(str(root)) / "ROOT.json", RootRecord(name="told", creates="atomic").body())
    with pytest.raises(ManifestError, match="has no run" if what == "no-run" else "no Kilobasis root"):
        View(StoragePath.parse(str(root)))
    result = invoke("top", root, "--once")
    assert (result.code, result.err.count("\n")) == (2, 1)


def test_curve_of_equal_numbers_is_flat() -> None:
    assert curve([0.2] * 3) == "▁▁▁"
    assert len(curve([1.0 / at for at in range(1, 1000)])) == 40
