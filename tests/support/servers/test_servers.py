import threading
from collections.abc import Callable
from typing import Any

import fsspec
import pytest
from botocore.exceptions import ClientError

from tests.support.servers.ceph import CephServer
from tests.support.servers.endpoint import Endpoint
from tests.support.servers.fixtures import REQUIRED, require
from tests.support.servers.moto import MotoServer
from tests.support.servers.s3 import S3Server, s3_client
from tests.support.servers.server import Server

ALL = ("ceph", "moto", "azurite", "swift", "gcs")
RACERS, RACES = 16, 5


@pytest.fixture(params=ALL)
def server(request: pytest.FixtureRequest) -> Server:
    return request.getfixturevalue(request.param)


@pytest.fixture
def reach(monkeypatch: pytest.MonkeyPatch) -> Callable[[Endpoint], fsspec.AbstractFileSystem]:
    """The file system that a user gets who has set the endpoint's variables, and no other of any provider."""
    import os

    def reach(endpoint: Endpoint) -> fsspec.AbstractFileSystem:
        for name in [name for name in os.environ if name.startswith(("AWS_", "AZURE_", "GOOGLE_", "STORAGE_"))]:
            monkeypatch.delenv(name)
        for name, value in endpoint.environment.items():
            monkeypatch.setenv(name, value)
        scheme = endpoint.root.partition("://")[0]
        return fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False)

    return reach


def race(file_system: fsspec.AbstractFileSystem, key: str) -> tuple[list[bytes], list[BaseException]]:
    """Bodies of those of many writers who were told that they created the object, and what the others were told."""
    line = threading.Barrier(RACERS)
    won: list[bytes] = []
    lost: list[BaseException] = []

    def write(body: bytes) -> None:
        line.wait()
        try:
            file_system.pipe_file(key, body, mode="create")
            won.append(body)
        except BaseException as error:  # noqa: BLE001 - judged by the test
            lost.append(error)

    racers = [threading.Thread(target=write, args=(b"%02d" % racer * 2048,)) for racer in range(RACERS)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    return won, lost


def test_server_environment_alone_serves_objects(server: Server, reach: Any) -> None:
    endpoint = server.bucket()
    files = reach(endpoint)
    body = bytes(range(256)) * 1024
    files.pipe_file(f"{endpoint.bucket}/deep/er/a b", body)
    files.pipe_file(f"{endpoint.bucket}/c", b"second")
    assert files.cat_file(f"{endpoint.bucket}/deep/er/a b") == body
    assert files.cat_file(f"{endpoint.bucket}/deep/er/a b", start=1000, end=3000) == body[1000:3000]
    assert sorted(files.find(endpoint.bucket)) == [f"{endpoint.bucket}/c", f"{endpoint.bucket}/deep/er/a b"]
    assert files.size(f"{endpoint.bucket}/c") == 6
    with pytest.raises(FileNotFoundError):
        files.cat_file(f"{endpoint.bucket}/absent")


def test_server_every_bucket_is_new_and_empty(server: Server, reach: Any) -> None:
    first, second = server.bucket(), server.bucket()
    assert len({first.root, second.root, server.endpoint.root}) == 3
    reach(first).pipe_file(f"{first.bucket}/a", b"x")
    assert reach(second).find(second.bucket) == []


@pytest.mark.parametrize("name", ["ceph", "swift"])
def test_server_wrong_secret_is_refused(name: str, request: pytest.FixtureRequest) -> None:
    server: S3Server = request.getfixturevalue(name)
    with (
        s3_client({**server.environment, "AWS_SECRET_ACCESS_KEY": "guessed"}) as client,
        pytest.raises(ClientError, match="SignatureDoesNotMatch"),
    ):
        client.put_object(Bucket=server.endpoint.bucket, Key="a", Body=b"x")


def test_azurite_wrong_key_is_refused(azurite: Server) -> None:
    from azure.core.exceptions import HttpResponseError
    from azure.storage.blob import BlobServiceClient

    text = azurite.environment["AZURE_STORAGE_CONNECTION_STRING"]
    guessed = text.replace("AccountKey=", "AccountKey=AAAA")
    with (
        BlobServiceClient.from_connection_string(guessed) as client,
        pytest.raises(HttpResponseError, match="failed to authenticate"),
    ):
        client.get_blob_client(azurite.endpoint.bucket, "a").upload_blob(b"x")


@pytest.mark.parametrize("name", ["ceph", "moto", "azurite"])
def test_create_if_absent_race_has_one_winner(name: str, request: pytest.FixtureRequest, reach: Any) -> None:
    endpoint = request.getfixturevalue(name).bucket()
    files = reach(endpoint)
    for number in range(RACES):
        key = f"{endpoint.bucket}/race{number}"
        won, lost = race(files, key)
        assert len(won) == 1
        assert files.cat_file(key) == won[0]
        # Ceph's refusal has no type of its own in s3fs.
        assert all(isinstance(error, OSError) for error in lost)


def test_swift_create_if_absent_holds_only_without_a_race(swift: Server, reach: Any) -> None:
    endpoint = swift.bucket()
    files = reach(endpoint)
    won, _ = race(files, f"{endpoint.bucket}/race")
    assert won  # 1 to 10 of the 16, a different number each time
    assert files.cat_file(f"{endpoint.bucket}/race") in won
    with pytest.raises(OSError, match="precondition"):
        files.pipe_file(f"{endpoint.bucket}/race", b"late", mode="create")
    assert files.cat_file(f"{endpoint.bucket}/race") != b"late"


def test_gcs_create_if_absent_overwrites_a_taken_name(gcs: Server, reach: Any) -> None:
    endpoint = gcs.bucket()
    files = reach(endpoint)
    files.pipe_file(f"{endpoint.bucket}/a", b"first", mode="create")
    files.pipe_file(f"{endpoint.bucket}/a", b"second", mode="create")
    assert files.cat_file(f"{endpoint.bucket}/a") == b"second"


def test_ceph_second_one_beside_the_first_ends_alone(ceph: CephServer) -> None:
    with CephServer() as second:
        assert second.port != ceph.port
        folder, names = second.processes.folder, ("mon", "osd", "rgw")
        pids = [second.processes.pid(name) for name in names]
        with s3_client(second.environment) as client:
            assert [bucket["Name"] for bucket in client.list_buckets()["Buckets"]] == [second.endpoint.bucket]
    import psutil

    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert not folder.exists()
    with s3_client(ceph.environment) as client:
        client.head_bucket(Bucket=ceph.endpoint.bucket)


def test_ceph_killed_daemons_lose_nothing_acknowledged(durable_ceph: CephServer) -> None:
    endpoint = durable_ceph.bucket()
    bodies = {f"object{index}": b"%d" % index * 4096 for index in range(8)}
    done: list[str] = []

    def write(client: Any) -> None:
        for key, body in bodies.items():
            client.put_object(Bucket=endpoint.bucket, Key=key, Body=body)
            done.append(key)

    with s3_client(endpoint.environment) as client:
        client.put_object(Bucket=endpoint.bucket, Key="before", Body=b"before")
        durable_ceph.kill_osd()
        writer = threading.Thread(target=write, args=(client,))
        writer.start()
        writer.join(timeout=0.3)
        assert writer.is_alive()
        assert not done, "nothing is acknowledged while nothing can be stored"
        durable_ceph.start_osd()
        writer.join(timeout=30)
        assert done == list(bodies)
        durable_ceph.kill_gateway()
        durable_ceph.start_gateway()
        for key, body in {**bodies, "before": b"before"}.items():
            assert client.get_object(Bucket=endpoint.bucket, Key=key)["Body"].read() == body


class Absent(MotoServer):
    name = "absent"

    @classmethod
    def missing(cls) -> str | None:
        return "Absent is not installed (make absent)"


@pytest.mark.parametrize("required", ["", "0", "moto ceph"])
def test_require_missing_server_skips_with_its_remedy(required: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REQUIRED, required)
    with pytest.raises(pytest.skip.Exception, match="make absent"):
        require(Absent)


@pytest.mark.parametrize("required", ["1", "moto absent"])
def test_require_missing_server_that_is_required_fails(required: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REQUIRED, required)
    with pytest.raises(pytest.fail.Exception, match=f"make absent.*{REQUIRED}"):
        require(Absent)
