"""Ten secrets in the environment and in URLs, and none of them in anything that is printed, stored or raised."""

import functools
import re
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from cluster import failures, ray_worker
from cluster.storage import attempts, objects, probe
from cluster.storage.objects import forget
from cluster.storage.parsing import parsing
from cluster.storage.path import StoragePath
from cluster.storage.redaction import HIDDEN, redact
from jobs import workspace
from pipeline.sources import models
from schemas.errors import IntegrityError, ManifestError
from tests.support import runs
from tests.support.canaries import Canaries, Gossip, canaries, gossip
from tests.support.command import Result, invoke
from tests.support.fixtures import write_manifest

Tree = dict[str, Any]

UNHEEDED = "only what the store's own policy says passes through redact; events, progress and other errors do not"
TARGETS = "a root that is named on the command line is not looked through for credentials"
SIGNED = "only some ways of signing a URL are known to be one"
PARTS = "a connection string is hidden where it stands whole; its key alone is not known as a secret"


@pytest.fixture
def secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Canaries:
    """All ten; the variables are set, and name endpoints where nobody listens."""
    return settle(canaries(tmp_path, 1), monkeypatch)


def settle(found: Canaries, monkeypatch: pytest.MonkeyPatch) -> Canaries:
    for name, value in found.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(attempts, "PATIENCE_SECONDS", 1.0)
    monkeypatch.setattr(probe, "DOOR_SECONDS", 1.0)
    monkeypatch.setattr(objects, "REQUEST_SECONDS", 3.0)
    forget()
    return found


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """No client of these tests is left for others."""
    yield
    forget()


def said(*arguments: str | Path) -> Result:
    """What a command leaves on the terminal, a traceback included."""
    try:
        return invoke(*arguments)
    except Exception as error:  # noqa: BLE001 - the interpreter would print it
        return Result(1, "", "".join(traceback.format_exception(error)))


def silent(secrets: Canaries, *arguments: str | Path) -> Result:
    """Run a command that says none of the secrets."""
    result = said(*arguments)
    assert secrets.leaked(result.out + result.err) == [], result
    return result


def test_canaries_are_found_in_whatever_clothes(secrets: Canaries, tmp_path: Path) -> None:
    """The tests below prove nothing with a search that finds nothing."""
    assert len(secrets.values) == 10
    for name, value in secrets.values.items():
        (tmp_path / "below").mkdir(exist_ok=True)
        (tmp_path / "below" / "x.bin").write_bytes(b"\xff\x00" + value.encode() + b"\xff")
        assert secrets.leaked(f"at {value}.") == [name]
        assert secrets.leaked_below(tmp_path / "below") == [f"{name} in x.bin"]
    assert secrets.leaked("nothing of the kind") == []


@pytest.mark.parametrize("length", [31, 130, 506])
def test_canaries_of_which_a_part_is_shown_are_found(length: int, secrets: Canaries) -> None:
    token = secrets.values["AWS_SESSION_TOKEN"]
    assert len(token) > 500
    for start in (0, 1, len(token) - length):
        assert secrets.leaked(f"denied: {token[start : start + length]}") == ["AWS_SESSION_TOKEN"]


# What foreign libraries say, cut to a line


def in_reaching(message: str) -> str:
    with pytest.raises(ManifestError) as caught, workspace.reaching("root", StoragePath.parse("s3://bucket/x")):
        raise RuntimeError(message)
    return str(caught.value)


def in_parsing(message: str) -> str:
    with pytest.raises(IntegrityError) as caught, parsing("x", "table"):
        raise RuntimeError(message)
    return str(caught.value)


SPEAKERS = {
    "a place of the user's": in_reaching,
    "a parser": in_parsing,
    "a unit": lambda message: failures.first_line(RuntimeError(message)),
    "a store": lambda message: attempts.reason(RuntimeError(message)),
    "a worker": lambda message: ray_worker.why(RuntimeError(f"The actor died: {message}")),
}


@pytest.mark.parametrize("before", [0, 40, 110, 140])
@pytest.mark.parametrize("who", SPEAKERS)
def test_secret_longer_than_a_message_is_hidden_before_the_message_is_cut(
    who: str, before: int, secrets: Canaries
) -> None:
    token = secrets.values["AWS_SESSION_TOKEN"]
    said = SPEAKERS[who](f"{'x' * before} refused {token}, ask again")
    assert secrets.leaked(said) == []
    assert HIDDEN in said


@pytest.mark.parametrize("part", [slice(0, 120), slice(-120, None), slice(7, 40)])
def test_secret_of_which_a_library_shows_a_part_is_hidden(part: slice, secrets: Canaries) -> None:
    token = secrets.values["AWS_SESSION_TOKEN"]
    assert redact(f"refused {token[part]} at key") == f"refused {HIDDEN} at key"


def test_paths_beside_a_file_of_credentials_are_not_hidden(secrets: Canaries) -> None:
    path = secrets.environment["GOOGLE_APPLICATION_CREDENTIALS"].replace("google.json", "corpus/part-0000.jsonl")
    assert redact(f"cannot read {path}") == f"cannot read {path}"


# Runs that succeed


def test_run_with_secrets_around_stores_and_prints_none(secrets: Canaries, tiny_manifest: Path, tmp_path: Path) -> None:
    assert silent(secrets, "run", tiny_manifest).code == 0
    (tmp_path / "root" / "harvest" / "stray").mkdir()
    (tmp_path / "root" / "harvest" / "stray" / "leftover").write_text("of a crash")
    for words in ("plan", "plan --json", "status", "status --json", "report", "report --json", "verify --full"):
        verb, *rest = words.split()
        assert silent(secrets, verb, tiny_manifest, *rest).code in (0, 4)
    for words in ("gc", "gc --delete --older-than 0", "repair", "resume"):
        verb, *rest = words.split()
        assert silent(secrets, verb, tiny_manifest, *rest).code in (0, 4)
    assert secrets.leaked_below(tmp_path / "root") == []


@pytest.mark.chaos
@pytest.mark.ray
def test_run_on_ray_with_secrets_around_stores_and_prints_none(
    secrets: Canaries, tiny_tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's token is a secret of the run's own."""
    for name in ("RAY_AUTH_TOKEN",):
        monkeypatch.setenv(name, secrets.environment[name])
    tiny_tree["compute"] |= {"pool": "ray", "workers": 2}
    log = tmp_path / "log"
    process = runs.start("run", str(write_manifest(tmp_path / "m.yaml", tiny_tree)), log=log)
    assert process.wait(timeout=runs.PATIENCE) == 0, log.read_text()
    assert secrets.leaked(log.read_text()) == []
    assert secrets.leaked_below(tmp_path / "root") == []


# Stores that are down, and stores that gossip

ROOTS = (
    "s3://bucket/root",
    "az://container/root",
    "abfs://container@kilobasis.dfs.core.windows.net/root",
    "gs://bucket/root",
)
QUICK = ("s3://bucket/root", "az://container/root")


def urls(slow: tuple[str, ...] = ()) -> list[Any]:
    marks = {url: [] if url in QUICK and url not in slow else [pytest.mark.chaos] for url in ROOTS}
    return [pytest.param(url, marks=marks[url], id=url.partition(":")[0]) for url in ROOTS]


@pytest.mark.parametrize("url", urls(slow=("az://container/root",)))
def test_root_in_a_store_that_is_down_is_told_without_secrets(
    url: str, secrets: Canaries, tiny_tree: Tree, tmp_path: Path
) -> None:
    tiny_tree["root"] = url
    manifest = write_manifest(tmp_path / "m.yaml", tiny_tree)
    for verb in ("plan", "run", "status", "report", "verify", "repair", "gc", "resume"):
        assert silent(secrets, verb, manifest).code in (2, 75)
    assert silent(secrets, "verify", url).code == 75


def heard(server: Gossip, secrets: Canaries) -> set[str]:
    return {name for line in server.heard for name in secrets.leaked(line)}


@pytest.mark.parametrize(
    "status", [403, pytest.param(401, marks=pytest.mark.chaos), pytest.param(400, marks=pytest.mark.chaos)]
)
@pytest.mark.parametrize("url", urls())
def test_root_in_a_store_that_repeats_what_it_is_sent_is_told_without_secrets(
    url: str, status: int, tiny_tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real ones do: a signature that does not match comes back with all that was signed."""
    tiny_tree["root"] = url
    manifest = write_manifest(tmp_path / "m.yaml", tiny_tree)
    with gossip(status) as server:
        secrets = settle(canaries(tmp_path, server.server_port), monkeypatch)
        for verb in ("plan", "run", "verify", "status"):
            result = silent(secrets, verb, manifest)
            assert result.code in (2, 75)
            assert "Authorization: AWS4" not in result.err
            assert not re.search(r"SharedKey \w+:[^*]", result.err)
        assert url.startswith("gs") or server.heard
        assert not url.startswith("s3") or heard(server, secrets) == {"AWS_SESSION_TOKEN"}


@pytest.mark.parametrize("status", [403, pytest.param(401, marks=pytest.mark.chaos)])
def test_corpus_in_a_store_that_repeats_what_it_is_sent_is_told_without_secrets(
    status: int, tiny_tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_tree["corpus"]["source"] = "s3://bucket/texts/a.jsonl"
    manifest = write_manifest(tmp_path / "m.yaml", tiny_tree)
    with gossip(status) as server:
        secrets = settle(canaries(tmp_path, server.server_port), monkeypatch)
        for verb in ("plan", "run"):
            result = said(verb, manifest)
            assert result.code in (2, 75)
            assert "bucket/texts" in result.err
            assert heard(server, secrets) == {"AWS_SESSION_TOKEN"}, "it was not told"
            assert secrets.leaked(result.out + result.err) == []


def test_hub_that_repeats_what_it_is_sent_is_told_without_the_token(
    tiny_tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_tree["model"] = {"source": "nobody/nothing"}
    manifest = write_manifest(tmp_path / "m.yaml", tiny_tree)
    with gossip(403) as server:
        secrets = settle(canaries(tmp_path, server.server_port), monkeypatch)
        place = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", place)
        monkeypatch.setattr(
            models.huggingface_hub,
            "snapshot_download",
            functools.partial(huggingface_hub.snapshot_download, endpoint=place, cache_dir=tmp_path / "cache"),
        )
        result = silent(secrets, "plan", manifest)
        assert heard(server, secrets) == {"HF_TOKEN"}
    assert result.code == 2
    assert "nobody/nothing" in result.err
