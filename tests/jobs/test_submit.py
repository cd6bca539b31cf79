"""`submit` against a Jobs API that does what is written down: the right exit code and advice, never a second job."""

import io
import shlex
import time
import zipfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.ray_jobs import JobsApi
from cluster.storage.create import create
from cluster.storage.path import StoragePath
from jobs import package
from schemas import events
from tests.support.command import Result, invoke, snapshot
from tests.support.fixtures import make_corpus, manifest_tree, write_manifest
from tests.support.jobs_api import Job, JobsServer


@pytest.fixture
def server() -> Iterator[JobsServer]:
    with JobsServer() as made:
        yield made


@pytest.fixture
def manifest(tiny_tree: dict[str, Any], tmp_path: Path) -> Path:
    del tiny_tree["compute"]["pool"]
    return write_manifest(tmp_path / "tiny.yaml", tiny_tree)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.submit.LOOK_SECONDS", 0.01)


def submit(server: JobsServer, manifest: Path, *more: str) -> Result:
    return invoke("submit", manifest, "--address", server.url, *more)


def is_one_line(result: Result) -> bool:
    return result.err.startswith("kilobasis: ") and result.err.count("\n") == 1 and " -> " in result.err


def test_manifest_is_submitted_once_and_followed_to_its_end(server: JobsServer, manifest: Path) -> None:
    server.next = deque([Job("PENDING", "RUNNING", "RUNNING", "SUCCEEDED")])
    result = submit(server, manifest)
    assert (result.code, result.err) == (0, "")
    (asked,) = server.submitted
    assert asked["submission_id"].startswith("kilobasis-tiny-")
    assert asked["submission_id"].endswith("-a1")
    # Ray would kill a job that was told to stop after three seconds, in the middle of what it commits.
    assert int(asked["runtime_env"]["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) >= 30
    command = shlex.split(asked["entrypoint"])
    assert command[:5] == ["python", "-m", "jobs", "run", "job/tiny.yaml"]
    assert f'root="{manifest.parent / "root"}"' in command
    assert 'compute.address="auto"' in command
    assert "running" in result.out
    assert "succeeded" in result.out


def test_package_has_the_code_and_the_manifest_and_nothing_else(server: JobsServer, manifest: Path) -> None:
    submit(server, manifest)
    (body,) = server.packages.values()
    names = zipfile.ZipFile(io.BytesIO(body)).namelist()
    assert "jobs/cli.py" in names
    assert "job/tiny.yaml" in names
    assert not [name for name in names if "__pycache__" in name or ".git/" in name or "manifests/" in name]
    assert {name.partition("/")[0] for name in names} == {"cluster", "job", "jobs", "pipeline", "schemas"}


def test_what_lies_beside_the_manifest_comes_along(server: JobsServer, tiny_model: Path, tmp_path: Path) -> None:
    make_corpus(tmp_path / "data" / "corpus")
    tree = manifest_tree(tiny_model, Path("./data/corpus"), tmp_path / "root")
    tree["corpus"]["source"] = "./data/corpus/*.jsonl"
    del tree["compute"]["pool"]
    assert submit(server, write_manifest(tmp_path / "beside.yaml", tree)).code == 0
    (body,) = server.packages.values()
    assert "job/data/corpus/part-0.jsonl" in zipfile.ZipFile(io.BytesIO(body)).namelist()
    command = shlex.split(server.submitted[0]["entrypoint"])
    assert 'corpus.source="./data/corpus/*.jsonl"' in command
    # The model lies elsewhere: it is named as it is understood here, and every machine has to have it there.
    assert f'model.source="{tiny_model}"' in command


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "SUCCEEDED"])
def test_duplicate_attaches_to_what_is_there(
    state: str, server: JobsServer, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.submit._is_whole", lambda _: True)
    server.next = deque([Job("RUNNING", "SUCCEEDED")])
    assert submit(server, manifest, "--no-follow").code == 0
    (name,) = server.jobs
    server.jobs[name].states = deque([state, "SUCCEEDED"] if state != "SUCCEEDED" else [state])
    result = submit(server, manifest)
    assert result.code == 0
    assert "is there already" in result.out
    assert len(server.submitted) == 1


@pytest.mark.parametrize("state", ["FAILED", "STOPPED"])
def test_job_that_is_over_without_success_is_tried_again(state: str, server: JobsServer, manifest: Path) -> None:
    submit(server, manifest, "--no-follow")
    (name,) = server.jobs
    server.jobs[name].states = deque([state])
    assert submit(server, manifest).code == 0
    assert [asked["submission_id"] for asked in server.submitted] == [name, name.removesuffix("1") + "2"]


def test_success_counts_only_while_the_root_has_it(server: JobsServer, manifest: Path) -> None:
    assert submit(server, manifest).code == 0
    # Nothing is there, whatever the job did.
    result = submit(server, manifest)
    assert result.code == 0
    assert "its root is not whole" in result.out
    assert len(server.submitted) == 2


def test_cluster_is_the_one_that_was_named(server: JobsServer, manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's client by itself believes the environment more than what it is told."""
    monkeypatch.setenv("RAY_ADDRESS", "http://other.invalid:8265")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://other.invalid:8265")
    assert submit(server, manifest).code == 0
    assert len(server.submitted) == 1


def test_root_with_a_strange_name_is_the_same_there(server: JobsServer, manifest: Path, tmp_path: Path) -> None:
    root = tmp_path / "with #1: and more"
    assert submit(server, manifest, "--set", f"root='{root}'").code == 0
    (override,) = (part for part in shlex.split(server.submitted[0]["entrypoint"]) if part.startswith("root="))
    assert yaml.safe_load(override.removeprefix("root=")) == str(root)


def test_change_of_the_manifest_is_another_job(server: JobsServer, manifest: Path) -> None:
    submit(server, manifest)
    submit(server, manifest, "--set", "dictionaries.0.k=5")
    first, second = (asked["submission_id"] for asked in server.submitted)
    assert first != second
    assert "dictionaries.0.k=5" in shlex.split(server.submitted[1]["entrypoint"])


def test_two_that_ask_at_the_same_time_have_one_job(server: JobsServer, manifest: Path) -> None:
    def other(server: JobsServer) -> None:
        server.before_submit = None
        assert submit(server, manifest, "--no-follow").code == 0

    server.before_submit = other
    result = submit(server, manifest)
    assert result.code == 0
    assert "is there already" in result.out
    assert len(server.submitted) == 1


def test_job_that_the_cluster_has_forgotten_is_not_submitted_again(server: JobsServer, manifest: Path) -> None:
    class Forgotten(Job):
        def told(self, job: str, ask: bool = True) -> dict[str, Any]:
            server.jobs.clear()
            return super().told(job, ask)

    server.next = deque([Forgotten("RUNNING")])
    result = submit(server, manifest)
    assert result.code == 75
    assert is_one_line(result)
    assert "no longer knows" in result.err
    assert "submit again" in result.err
    assert len(server.submitted) == 1


def test_job_that_was_never_seen_is_given_up(
    server: JobsServer, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.submit.GRACE_SECONDS", 0.1)
    lose = server._submit

    def lost(asked: dict[str, Any]) -> tuple[int, Any]:
        answer = lose(asked)
        server.jobs.clear()
        return answer

    monkeypatch.setattr(server, "_submit", lost)
    result = submit(server, manifest)
    assert result.code == 75
    assert is_one_line(result)
    assert len(server.submitted) == 1


def test_job_goes_on_when_nobody_follows_it_any_more(
    server: JobsServer, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    server.next = deque([Job("RUNNING")])
    monkeypatch.setattr("jobs.submit.time.sleep", interrupted)
    result = submit(server, manifest)
    assert result.code == 75
    assert "goes on" in result.err
    assert "resume" not in result.err
    assert not server.stopped


def test_job_that_waits_for_too_long_says_for_what(server: JobsServer, manifest: Path) -> None:
    message = "Job has not started yet. It may be waiting for resources (CPUs, GPUs) to become available."
    server.next = deque([Job("PENDING", message=message)])
    result = submit(server, manifest, "--pending", "1")
    assert result.code == 75
    assert is_one_line(result)
    assert "waiting for resources" in result.err
    assert not server.stopped


@pytest.mark.parametrize("status", [401, 403])
def test_dashboard_that_wants_a_token_is_a_users_error(status: int, server: JobsServer, manifest: Path) -> None:
    server.troubles = deque([status] * 9)
    result = submit(server, manifest)
    assert result.code == 2
    assert is_one_line(result)
    assert "token" in result.err
    assert not server.submitted


@pytest.mark.parametrize("trouble", [500, 503, "drop"])
def test_dashboard_that_does_not_work_is_no_users_error(trouble: int | str, server: JobsServer, manifest: Path) -> None:
    server.troubles = deque([trouble] * 9)
    result = submit(server, manifest)
    assert result.code == 75
    assert is_one_line(result)
    assert not server.submitted


def test_cluster_that_has_just_come_up_is_waited_for(server: JobsServer, manifest: Path) -> None:
    """It answers before it can start anything. An answer that was lost on the way asks for nothing twice."""
    server.starting = deque(["No available agent to submit job, please try again later."] * 3)
    result = submit(server, manifest)
    assert (result.code, len(server.submitted)) == (0, 1)


def test_cluster_that_starts_nothing_is_given_up(
    server: JobsServer, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.submit.START_SECONDS", 0.1)
    server.starting = deque(["No available agent to submit job, please try again later."] * 1000)
    result = submit(server, manifest)
    assert (result.code, is_one_line(result)) == (75, True)
    assert "No available agent" in result.err
    assert not server.submitted


def test_dashboard_that_is_not_there(server: JobsServer, manifest: Path) -> None:
    url = server.url
    server.__exit__()
    result = invoke("submit", manifest, "--address", url)
    assert result.code == 75
    assert is_one_line(result)


@pytest.mark.parametrize("trouble", [500, "drop"])
def test_dashboard_that_drops_out_for_a_while_is_missed(trouble: int | str, server: JobsServer, manifest: Path) -> None:
    server.next = deque([Job("RUNNING", "RUNNING", "SUCCEEDED")])
    server.before_submit = lambda server: server.troubles.extend([None, None, trouble, trouble, trouble])
    # The answer to the submission itself, and to the first question, come through.
    server.troubles = deque()
    result = submit(server, manifest)
    assert (result.code, len(server.submitted)) == (0, 1)
    assert "goes on without it" in result.out
    assert "is back" in result.out


def test_dashboard_that_stays_silent_is_given_up(
    server: JobsServer, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.submit.SILENT_SECONDS", 0.2)
    server.next = deque([Job("RUNNING")])
    server.before_submit = lambda server: server.troubles.extend([None, *[500] * 500])
    result = submit(server, manifest)
    assert result.code == 75
    assert is_one_line(result)
    assert "submit again" in result.err
    assert len(server.submitted) == 1


def test_other_version_of_ray_is_refused(server: JobsServer, manifest: Path) -> None:
    server.version = "2.9.0"
    result = submit(server, manifest)
    assert result.code == 2
    assert is_one_line(result)
    assert "2.9.0" in result.err
    assert not server.submitted


def test_what_is_no_dashboard(server: JobsServer, manifest: Path) -> None:
    server.troubles = deque(["html"] * 9)
    assert is_one_line(submit(server, manifest))
    for address in ("ray://host:10001", "host:8265", "nonsense", "http://[::1:8265"):
        result = invoke("submit", manifest, "--address", address)
        assert result.code == 2
        assert is_one_line(result)
    assert not server.submitted


@pytest.mark.parametrize(("exit_code", "expected"), [(4, 4), (75, 75), (5, 5), (1, 5), (None, 5)])
def test_failed_job_ends_with_its_drivers_code_and_words(
    exit_code: int | None, expected: int, server: JobsServer, manifest: Path
) -> None:
    logs = "12:00:00 harvest started\nkilobasis: unit 000003 is damaged -> resume\n"
    server.next = deque([Job("RUNNING", "FAILED", exit_code=exit_code, logs=logs, message="exit code 4")])
    result = submit(server, manifest)
    assert result.code == expected
    assert is_one_line(result)
    assert "unit 000003 is damaged" in result.err


def test_job_that_was_stopped_is_interrupted(server: JobsServer, manifest: Path) -> None:
    server.next = deque([Job("RUNNING", "STOPPED")])
    result = submit(server, manifest)
    assert result.code == 75
    assert "was stopped" in result.err


def test_stages_are_told_from_the_root(server: JobsServer, manifest: Path) -> None:
    root = StoragePath.parse(str(manifest.parent / "root"))

    class Working(Job):
        def told(self, job: str, ask: bool = True) -> dict[str, Any]:
            run = root / "runs" / "20270101T000000.000000Z-aaaaaa"
            lines = [events.StageStarted("harvest", 0, 3, "harvest/abc"), events.Note("harvest", "a note")]
            body = "\n".join(events.line(event, time.time()) for event in lines)
            if len(self.states) == 2:
                create(run / "events" / "000000.jsonl", body.encode())
            return super().told(job, ask)

    server.next = deque([Working("RUNNING", "RUNNING", "SUCCEEDED")])
    result = submit(server, manifest)
    assert "harvest              started" in result.out
    assert "a note" in result.out


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "SUCCEEDED", "FAILED", "STOPPED", None])
def test_stop_in_every_state(state: str | None, server: JobsServer, manifest: Path) -> None:
    if state is not None:
        submit(server, manifest, "--no-follow")
        (job,) = server.jobs.values()
        job.states = deque([state])
    result = invoke("stop", manifest, "--address", server.url)
    assert result.code == 0
    running = state in ("PENDING", "RUNNING")
    assert ("asked to stop" in result.out) == running
    assert ("no job" in result.out) != running
    assert len(server.stopped) == running


def test_list_and_logs_of_a_cluster(server: JobsServer, manifest: Path) -> None:
    server.next = deque([Job("RUNNING", logs="what the driver says\n")])
    server.jobs["somebody-elses"] = Job("RUNNING")
    submit(server, manifest, "--no-follow")
    (name,) = (job for job in server.jobs if job != "somebody-elses")
    listed = invoke("list", "--address", server.url)
    assert name in listed.out
    assert "running" in listed.out
    assert "somebody-elses" not in listed.out
    assert name in invoke("list", manifest, "--address", server.url).out
    assert invoke("logs", name, "--address", server.url).out == "what the driver says\n"
    for target, address in (("list", []), ("logs", [name])):
        asked = len(server.asked)
        result = invoke(target, *address, "--address", server.url, "--set", "root=elsewhere")
        assert (result.code, is_one_line(result), len(server.asked)) == (2, True, asked)
        assert "--set" in result.err
    gone = invoke("logs", "kilobasis-gone-a1", "--address", server.url)
    assert (gone.code, is_one_line(gone)) == (2, True)


def test_too_large_a_package_names_what_is_large(
    server: JobsServer, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package, "MOST_BYTES", 1000)
    result = submit(server, manifest)
    assert result.code == 2
    assert is_one_line(result)
    assert "largest: " in result.err
    assert not server.submitted
    assert not server.packages


def test_what_cannot_work_there_is_refused_and_writes_nothing(server: JobsServer, manifest: Path) -> None:
    before = snapshot(manifest.parent)
    for more, said in (
        (["--set", "compute.pool=inline"], "inline"),
        (["--set", "name=https://me:hunter2@host/x"], "***"),
        (["--set", "corpus.source=https://me:hunter2@host/x.jsonl"], "credential"),
    ):
        result = submit(server, manifest, *more)
        assert (result.code, is_one_line(result)) == (2, True)
        assert said in result.err
        assert "hunter2" not in result.err
    assert not server.submitted
    assert snapshot(manifest.parent) == before


def test_what_cannot_be_read_is_named(server: JobsServer, tiny_model: Path, tmp_path: Path) -> None:
    make_corpus(tmp_path / "data")
    (tmp_path / "data" / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "data" / ".gitignore").write_text("*")
    tree = manifest_tree(tiny_model, tmp_path / "data", tmp_path / "root")
    del tree["compute"]["pool"]
    manifest = write_manifest(tmp_path / "tiny.yaml", tree)
    assert submit(server, manifest).code == 0
    # What leads nowhere is nothing; and Ray would leave out what a .gitignore names.
    (body,) = server.packages.values()
    names = [name for name in zipfile.ZipFile(io.BytesIO(body)).namelist() if name.startswith("job/data/")]
    assert [name for name in names if not name.endswith("/")] == [f"job/data/part-{at}.jsonl" for at in range(3)]


@pytest.mark.parametrize(
    ("address", "token", "open_to_all"),
    [
        ("http://127.0.0.1:8265", False, False),
        ("http://head.invalid:8265", False, True),
        ("http://head.invalid:8265", True, False),
        ("https://head.invalid", False, False),
    ],
)
def test_dashboard_that_everybody_can_use_is_known(
    address: str, token: bool, open_to_all: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray._private.authentication.authentication_utils.is_token_auth_enabled", lambda: token)
    api = object.__new__(JobsApi)
    api.address = address
    assert api.open_to_all is open_to_all


def test_network_has_to_be_vouched_for(server: JobsServer, manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(JobsApi, "open_to_all", property(lambda _: True))
    result = submit(server, manifest)
    assert (result.code, is_one_line(result)) == (2, True)
    assert "--private-network" in result.err
    assert not server.submitted
    assert submit(server, manifest, "--private-network").code == 0
