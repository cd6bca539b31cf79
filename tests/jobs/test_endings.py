"""How a run ended: by its own last word in the root, or by its last sign of life where it could not say one."""

import errno
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.storage.path import StoragePath
from jobs import manifest as manifests
from jobs import runner
from jobs.screen import View
from jobs.status import alive, beats, heard
from schemas import events
from schemas.errors import IntegrityError, InterruptedRunError, StorageError
from tests.support import roots
from tests.support.command import Result, invoke

COMMANDS: dict[str, Callable[[Path], Result]] = {
    "list": lambda root: invoke("list", root),
    "status": lambda root: invoke("status", root),
    "logs": lambda root: invoke("logs", root),
    "top": lambda root: invoke("top", root, "--once"),
}


def elsewhere(run: Path) -> None:
    """As if the run had been led from a machine that is gone."""
    noted = run / "process.json"
    noted.write_text(json.dumps(json.loads(noted.read_text()) | {"host": "gone.invalid", "boot": "b"}))


def last_word(root: Path) -> dict[str, Any]:
    return roots.events(roots.newest(root))[-1]


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Call something when a run begins with its stages."""

    def install(what: Callable[[], None]) -> None:
        inner = runner._run_stages

        def stages(*args: Any) -> Any:
            what()
            return inner(*args)

        monkeypatch.setattr(runner, "_run_stages", stages)

    return install


@pytest.mark.parametrize("command", COMMANDS)
def test_finished_run_is_known_from_its_root_alone(command: str, copied: SimpleNamespace) -> None:
    elsewhere(roots.newest(copied.root))
    assert last_word(copied.root) | {"time": 0} == {
        "time": 0, "event": "RunEnded", "stage": "run", "exit_code": 0, "reason": ""
    }  # fmt: skip
    result = COMMANDS[command](copied.root)
    assert result.code == 0, result.err
    assert ("everything is committed" if command == "logs" else "finished") in result.out
    assert "another machine" not in result.out


@pytest.mark.parametrize("command", COMMANDS)
def test_failed_run_says_why_and_with_which_code(
    command: str, tiny_manifest: Path, tmp_path: Path, broken: Any
) -> None:
    def damaged() -> None:
        raise IntegrityError("unit 000003 is damaged", "`kilobasis repair` it")

    broken(damaged)
    assert invoke("run", tiny_manifest).code == 4
    elsewhere(roots.newest(tmp_path / "root"))
    shown = COMMANDS[command](tmp_path / "root").out
    assert "exit code 4" in shown
    assert "unit 000003 is damaged -> `kilobasis repair` it" in " ".join(shown.replace("│", " ").split())


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (RuntimeError("boom\nand more"), 1, "RuntimeError: boom"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 75, "stopped: No space left on device -> make room"),
        (IntegrityError("of hunter2-hunter2"), 4, "of ***"),
        (KeyboardInterrupt(), 75, "KeyboardInterrupt"),
    ],
    ids=["bug", "disk", "secret", "keyboard"],
)
def test_whatever_ends_a_run_is_its_last_word(
    error: BaseException, code: int, reason: str, tiny_manifest: Path, tmp_path: Path, broken: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def fail() -> None:
        raise error

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2-hunter2")
    broken(fail)
    with pytest.raises(StorageError if code == 75 and isinstance(error, OSError) else type(error)):
        runner.run(manifests.load(tiny_manifest, []))
    word = last_word(tmp_path / "root")
    assert word["exit_code"] == code
    assert word["reason"].startswith(reason)
    assert "hunter2" not in word["reason"]


def test_run_that_was_told_to_stop_says_so(tiny_manifest: Path, tmp_path: Path, broken: Any) -> None:
    broken(lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(InterruptedRunError):
        runner.run(manifests.load(tiny_manifest, []))
    word = last_word(tmp_path / "root")
    assert word["exit_code"] == 75
    assert word["reason"].startswith("stopped by SIGTERM")
    assert "-> continue with `kilobasis resume`" in word["reason"]


def killed(root: Path, silent: float) -> Path:
    """As if the newest run had been killed in its harvest, on another machine; its folder."""
    run = roots.newest(root)
    elsewhere(run)
    told, when = [], time.time() - 7200
    for event in roots.events(run):
        told.append(json.dumps(event | {"time": when}))
        if (event["event"], event["stage"]) == ("StageStarted", "harvest"):
            break
    for segment in (run / "events").iterdir():
        segment.unlink()
    (run / "events" / "000000.jsonl").write_text("\n".join(told) + "\n")
    for beat in root.glob("*/*/beats/*"):
        os.utime(beat, (time.time() - silent,) * 2)
    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_run_that_was_killed_elsewhere_is_last_heard_of_by_its_beats(command: str, copied: SimpleNamespace) -> None:
    killed(copied.root, silent=605)
    shown = COMMANDS[command](copied.root).out
    assert "on another machine" in shown
    assert "10 min" in shown
    assert "exit code" not in shown
    assert "finished" not in shown


def test_run_that_was_killed_here_left_no_last_word(copied: SimpleNamespace) -> None:
    run = killed(copied.root, silent=605)
    noted = run / "process.json"
    host = json.loads(noted.read_text())
    # Its machine is this one after all, and its process is gone.
    ours = json.loads(json.dumps(runner.leases.this_process().model_dump()))
    noted.write_text(json.dumps(host | ours | {"pid": roots.dead_process()}))
    for command in COMMANDS.values():
        assert "not running, without a last word" in command(copied.root).out


def test_last_word_counts_more_than_a_process_that_lives(copied: SimpleNamespace) -> None:
    """A process may run several manifests, one after the other: this one has."""
    run = roots.newest(copied.root)
    assert alive(StoragePath.parse(run)) is False
    roots.lose_last_word(run)
    assert alive(StoragePath.parse(run)) is True


def test_beats_of_stages_that_were_committed_are_no_sign_of_life(copied: SimpleNamespace) -> None:
    run, root = roots.newest(copied.root), StoragePath.parse(copied.root)
    told = [
        (event["time"], kind(**{key: value for key, value in event.items() if key not in ("time", "event")}))
        for event in roots.events(run)
        if (kind := getattr(events, event["event"]))
    ]
    late = time.time() + 1000
    for beat in copied.root.glob("**/beats/*"):
        os.utime(beat, (late, late))
    assert heard(root, told) == pytest.approx(max(when for when, _ in told))
    begun = [event for _, event in told if isinstance(event, events.StageStarted)]
    assert max(beats(root, begun)) == pytest.approx(late)


@pytest.mark.parametrize("stage", ["..", "train/../../..", "../../etc", "/etc", "train/"])
def test_stages_that_somebody_made_up_lead_nowhere(stage: str, copied: SimpleNamespace) -> None:
    assert beats(StoragePath.parse(copied.root), [events.StageStarted(stage, 0, 1, "passwd/..")]) == []


def test_view_takes_a_last_word_for_no_stage(copied: SimpleNamespace) -> None:
    view = View(StoragePath.parse(copied.root))
    assert events.RUN not in view.stages
    assert view.ended == events.RunEnded("run", 0, "")


def test_stop_knows_a_run_that_is_over(copied: SimpleNamespace) -> None:
    elsewhere(roots.newest(copied.root))
    over = invoke("stop", copied.root)
    assert (over.code, "nothing runs" in over.out) == (0, True)
    roots.lose_last_word(roots.newest(copied.root))
    unknown = invoke("stop", copied.root)
    assert (unknown.code, "gone.invalid" in unknown.err) == (75, True)
