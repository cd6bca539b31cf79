import http.client
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import fsspec
import pytest
from botocore.exceptions import ClientError

from tests.support.servers.endpoint import Endpoint
from tests.support.servers.fault_proxy import FaultProxy
from tests.support.servers.faults import ERRORS, Fault, Request, Rule, Rules
from tests.support.servers.s3 import s3_client
from tests.support.servers.server import Server

BODY = bytes(range(256)) * 16
UNCHECKED = "AWS4-HMAC-SHA256 Credential=a/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"


@dataclass(frozen=True)
class Bucket:
    """A raw client without retries and checksums, for a server that looks at no signature."""

    endpoint: Endpoint
    timeout: float = 10

    def ask(self, method: str, key: str, body: bytes | None = None) -> tuple[int, bytes]:
        with closing(http.client.HTTPConnection("127.0.0.1", self.endpoint.port, timeout=self.timeout)) as connection:
            connection.request(method, f"/{self.endpoint.bucket}/{key}", body, {"Authorization": UNCHECKED})
            with connection.getresponse() as answer:
                return answer.status, answer.read()

    def put(self, key: str, body: bytes = BODY) -> int:
        return self.ask("PUT", key, body)[0]

    def get(self, key: str) -> bytes | None:
        status, body = self.ask("GET", key)
        return body if status == 200 else None


@pytest.fixture
def direct(moto: Server) -> Bucket:
    """A bucket, and the same one through the proxy."""
    return Bucket(moto.bucket())


@pytest.fixture
def proxied(direct: Bucket, fault_proxy: FaultProxy) -> Bucket:
    return Bucket(fault_proxy.endpoint(direct.endpoint))


def changed_bits(a: bytes, b: bytes) -> int:
    assert len(a) == len(b)
    return sum((x ^ y).bit_count() for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("fault", sorted(ERRORS))
def test_fault_error_is_answered_and_not_applied(
    fault: Fault, direct: Bucket, proxied: Bucket, fault_proxy: FaultProxy
) -> None:
    fault_proxy.inject(Rule(fault, method="PUT"))
    with s3_client(proxied.endpoint.environment) as client, pytest.raises(ClientError) as caught:
        client.put_object(Bucket=proxied.endpoint.bucket, Key="a", Body=BODY)
    answer: Any = caught.value.response
    assert f"{answer['ResponseMetadata']['HTTPStatusCode']} {answer['Error']['Code']}" == fault.value
    assert direct.get("a") is None
    (exchange,) = fault_proxy.log
    assert (exchange.method, exchange.key, exchange.fault) == ("PUT", "a", fault)
    assert exchange.status == int(fault.value[:3])
    assert proxied.put("a") == 200
    assert direct.get("a") == BODY


@pytest.mark.parametrize(
    ("fault", "ends", "applied"),
    [
        (Fault.RESET_BEFORE, ConnectionResetError, False),
        (Fault.RESET_AFTER, ConnectionResetError, True),
        (Fault.LOST_ANSWER, http.client.RemoteDisconnected, True),
    ],
)
def test_fault_broken_connection_is_applied_or_not(
    fault: Fault,
    ends: type[Exception],
    applied: bool,
    direct: Bucket,
    proxied: Bucket,
    fault_proxy: FaultProxy,
) -> None:
    fault_proxy.inject(Rule(fault))
    with pytest.raises(ends) as caught:
        proxied.put("a")
    assert type(caught.value) is ends  # an orderly end is a kind of reset for this client
    assert direct.get("a") == (BODY if applied else None)
    assert [exchange.status for exchange in fault_proxy.seen(fault=fault)] == [None]


def test_fault_timeout_holds_until_the_client_gives_up(
    direct: Bucket, proxied: Bucket, fault_proxy: FaultProxy
) -> None:
    fault_proxy.inject(Rule(Fault.TIMEOUT))
    with pytest.raises(TimeoutError):
        Bucket(proxied.endpoint, timeout=0.2).put("a")
    assert direct.get("a") is None


def test_fault_timeout_ends_after_its_seconds(direct: Bucket, proxied: Bucket, fault_proxy: FaultProxy) -> None:
    fault_proxy.inject(Rule(Fault.TIMEOUT, seconds=0.2))
    began = time.monotonic()
    with pytest.raises(ConnectionResetError):
        proxied.put("a")
    assert time.monotonic() - began >= 0.2
    assert direct.get("a") is None


def test_fault_late_is_applied_after_the_client_gave_up(
    direct: Bucket, proxied: Bucket, fault_proxy: FaultProxy
) -> None:
    fault_proxy.inject(Rule(Fault.LATE, method="PUT", seconds=1.5))
    with pytest.raises(TimeoutError):
        Bucket(proxied.endpoint, timeout=0.1).put("a")
    assert direct.get("a") is None
    deadline = time.monotonic() + 10
    while direct.get("a") is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert direct.get("a") == BODY


def test_fault_cut_body_ends_before_its_length(direct: Bucket, proxied: Bucket, fault_proxy: FaultProxy) -> None:
    direct.put("a")
    fault_proxy.inject(Rule(Fault.CUT_BODY))
    with pytest.raises(http.client.IncompleteRead) as caught:
        proxied.get("a")
    assert caught.value.partial == BODY[: len(BODY) // 2]
    assert proxied.get("a") == BODY


def test_fault_short_body_looks_whole(direct: Bucket, proxied: Bucket, fault_proxy: FaultProxy) -> None:
    direct.put("a")
    fault_proxy.inject(Rule(Fault.SHORT_BODY))
    assert proxied.get("a") == BODY[: len(BODY) // 2]
    assert proxied.get("a") == BODY


def test_fault_flipped_answer_differs_by_one_bit(direct: Bucket, proxied: Bucket, fault_proxy: FaultProxy) -> None:
    direct.put("a")
    fault_proxy.inject(Rule(Fault.FLIPPED_ANSWER))
    assert changed_bits(proxied.get("a") or b"", BODY) == 1
    assert proxied.get("a") == BODY


def test_fault_flipped_request_is_stored_with_one_other_bit(
    direct: Bucket, proxied: Bucket, fault_proxy: FaultProxy
) -> None:
    fault_proxy.inject(Rule(Fault.FLIPPED_REQUEST))
    assert proxied.put("a") == 200
    assert changed_bits(direct.get("a") or b"", BODY) == 1


def test_fault_slow_takes_its_time(direct: Bucket, proxied: Bucket, fault_proxy: FaultProxy) -> None:
    direct.put("a", b"0123456789")
    fault_proxy.inject(Rule(Fault.SLOW, method="GET", rate=40))
    began = time.monotonic()
    assert proxied.get("a") == b"0123456789"
    assert time.monotonic() - began >= 10 / 40


def test_fault_of_a_body_that_is_not_there_is_not_logged(proxied: Bucket, fault_proxy: FaultProxy) -> None:
    fault_proxy.inject(Rule(Fault.CUT_BODY))
    assert proxied.get("absent") is None
    assert [(exchange.status, exchange.fault) for exchange in fault_proxy.log] == [(404, None)]


def hits(rules: Rules, method: str, key: str, query: str = "", count: int = 1) -> list[bool]:
    return [rules.decide(Request(method, key, query, has_body=True)) is not None for _ in range(count)]


def test_rule_nth_and_count_choose_the_requests() -> None:
    rules = Rules()
    rules.add((Rule(Fault.SLOW_DOWN, method="PUT", key="units/*.json", nth=3, count=2),))
    assert not any(hits(rules, "GET", "units/1.json", count=5) + hits(rules, "PUT", "units.json", count=5))
    assert hits(rules, "PUT", "units/1.json", count=6) == [False, False, True, True, False, False]


def test_rule_query_chooses_parts_of_an_upload() -> None:
    rules = Rules()
    rules.add((Rule(Fault.SLOW_DOWN, query="*partNumber=2*", count=None),))
    assert hits(rules, "PUT", "a", "uploadId=x&partNumber=1") == [False]
    assert hits(rules, "PUT", "a", "uploadId=x&partNumber=2", count=2) == [True, True]


def test_rule_probability_depends_on_the_seed_and_not_on_the_order() -> None:
    def fates(seed: int, keys: list[str]) -> dict[str, list[bool]]:
        rules = Rules()
        rules.add((Rule(Fault.SLOW_DOWN, probability=0.3, count=None, seed=seed),))
        found: dict[str, list[bool]] = {key: [] for key in keys}
        for key in keys * 20:
            found[key] += hits(rules, "GET", key)
        return found

    keys = [f"key{index}" for index in range(20)]
    assert fates(1, keys) == fates(1, keys[::-1]) != fates(2, keys)
    assert 80 < sum(sum(fate) for fate in fates(1, keys).values()) < 160


def test_rules_of_several_the_first_decides_and_ends_with_its_block(proxied: Bucket, fault_proxy: FaultProxy) -> None:
    with fault_proxy.injecting(Rule(Fault.SLOW_DOWN, count=1), Rule(Fault.ACCESS_DENIED, count=None)):
        assert [proxied.put("a") for _ in range(3)] == [503, 403, 403]
    assert proxied.put("a") == 200
    assert len(fault_proxy.seen(method="PUT", key="a")) == 4


@pytest.mark.parametrize(
    ("scheme", "target", "key"),
    [
        ("s3", "/bucket", ""),
        ("s3", "/bucket/?list-type=2&prefix=a", ""),
        ("s3", "/bucket/a/b%20c?uploadId=x", "a/b c"),
        ("az", "/account/container?restype=container&comp=list", ""),
        ("az", "/account/container/a/b%20c?comp=block", "a/b c"),
        ("gs", "/storage/v1/b/bucket/o?prefix=a", ""),
        ("gs", "/storage/v1/b/bucket/o/a%2Fb?alt=media", "a/b"),
        ("gs", "/upload/storage/v1/b/bucket/o?uploadType=media&name=a%2Fb", "a/b"),
    ],
)
def test_request_key_is_the_objects(scheme: str, target: str, key: str) -> None:
    assert Request.parse(scheme, "GET", target, has_body=False).key == key


# adlfs hands whole bytes to aiohttp.
@pytest.mark.filterwarnings("ignore:Sending a large body directly with raw bytes:ResourceWarning")
@pytest.mark.parametrize("name", ["ceph", "moto", "azurite", "swift"])
def test_proxy_without_rules_changes_nothing(
    name: str, fault_proxy: FaultProxy, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct = request.getfixturevalue(name).bucket()
    endpoint = fault_proxy.endpoint(direct)
    assert endpoint.root == direct.root
    for variable, value in endpoint.environment.items():
        monkeypatch.setenv(variable, value)
    files = fsspec.filesystem(endpoint.root.partition("://")[0], skip_instance_cache=True, use_listings_cache=False)
    body = os.urandom(6 << 20)
    with files.open(f"{endpoint.bucket}/in parts", "wb", block_size=5 << 20) as stream:
        stream.write(body)
    files.pipe_file(f"{endpoint.bucket}/whole", body[: 1 << 19], mode="create")
    with pytest.raises(OSError):  # noqa: PT011 - its type and words depend on the store
        files.pipe_file(f"{endpoint.bucket}/whole", b"again", mode="create")
    assert files.cat_file(f"{endpoint.bucket}/in parts") == body
    assert files.cat_file(f"{endpoint.bucket}/whole", start=7, end=9999) == body[7:9999]
    assert len(files.find(endpoint.bucket)) == 2
    assert fault_proxy.seen("PUT", "whole")
    assert not [exchange for exchange in fault_proxy.log if exchange.fault]


def test_proxy_before_ceph_keeps_signatures_and_ceph_notices_a_flipped_bit(
    ceph: Server, fault_proxy: FaultProxy
) -> None:
    endpoint = fault_proxy.endpoint(ceph.bucket())
    with s3_client(endpoint.environment) as client:
        client.put_object(Bucket=endpoint.bucket, Key="a", Body=BODY)
        with fault_proxy.injecting(Rule(Fault.FLIPPED_REQUEST)), pytest.raises(ClientError, match="SHA256"):
            client.put_object(Bucket=endpoint.bucket, Key="b", Body=BODY)
        assert client.get_object(Bucket=endpoint.bucket, Key="a")["Body"].read() == BODY
    with (
        s3_client({**endpoint.environment, "AWS_SECRET_ACCESS_KEY": "guessed"}) as client,
        pytest.raises(ClientError, match="SignatureDoesNotMatch"),
    ):
        client.put_object(Bucket=endpoint.bucket, Key="a", Body=b"x")


def test_proxy_before_moto_passes_chunks_with_a_checksum_behind_them(moto: Server, fault_proxy: FaultProxy) -> None:
    from pyarrow.fs import S3FileSystem

    endpoint = fault_proxy.endpoint(moto.bucket())
    files = S3FileSystem(
        access_key="key", secret_key="secret", region="us-east-1", scheme="http", endpoint_override=endpoint.address
    )
    body = os.urandom(11 << 20)
    with files.open_output_stream(f"{endpoint.bucket}/a") as stream:
        stream.write(body)
    with files.open_input_stream(f"{endpoint.bucket}/a") as stream:
        assert stream.read() == body
    assert len(fault_proxy.seen("PUT", "a")) >= 2


# Amazon's own chunks inside of HTTP's, as clients send them who put a checksum behind the body.
INNER = b"5;chunk-signature=00\r\nhello\r\n0\r\n\r\n"
REQUEST = (
    b"PUT /bucket/a?partNumber=1&uploadId=x%%2B HTTP/1.1\r\nHOST: store.example:99\r\nx-AMZ-odd:  two  spaces\r\n"
    b"Content-Encoding: aws-chunked\r\nTransfer-Encoding: chunked\r\nX-Amz-Trailer: x-amz-checksum-crc32\r\n\r\n"
    b"%X;ext=1\r\n%b\r\n4\r\nmore\r\n0\r\nx-amz-checksum-crc32: AAAAAA==\r\n\r\n" % (len(INNER), INNER)
)
ANSWER = b'HTTP/1.1 200 Fine\r\nETAG: "x"\r\nTransfer-Encoding: chunked\r\n\r\n3;a=b\r\nabc\r\n0\r\nTrailer: 1\r\n\r\n'


@pytest.fixture
def recorder() -> Iterator[tuple[Endpoint, bytearray]]:
    """A store of one connection that keeps what it is sent, and gives a go-ahead and an answer."""
    received = bytearray()

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            while not received.endswith(REQUEST[-20:]):
                first, block = not received, connection.recv(65536)
                if not block:
                    return
                received.extend(block)
                if first and b"100-continue" in received:
                    connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            connection.sendall(ANSWER)
            connection.recv(1)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        port = listener.getsockname()[1]
        yield Endpoint("recorder", "s3://bucket", {"URL": f"http://127.0.0.1:{port}"}, real=False, port=port), received
        thread.join(timeout=10)


def read_until(connection: socket.socket, end: bytes) -> bytes:
    received = b""
    while not received.endswith(end):
        block = connection.recv(65536)
        assert block, f"the connection ended after {received!r}"
        received += block
    return received


def test_proxy_chunked_messages_arrive_byte_by_byte(
    recorder: tuple[Endpoint, bytearray], fault_proxy: FaultProxy
) -> None:
    upstream, received = recorder
    endpoint = fault_proxy.endpoint(upstream)
    assert endpoint.environment == {"URL": f"http://{endpoint.address}"}
    with socket.create_connection(("127.0.0.1", endpoint.port), timeout=10) as client:
        for start in range(0, len(REQUEST), 7):
            client.sendall(REQUEST[start : start + 7])
        assert read_until(client, ANSWER[-9:]) == ANSWER
    assert bytes(received) == REQUEST
    fault_proxy.close()


def test_proxy_go_ahead_is_passed_on(recorder: tuple[Endpoint, bytearray], fault_proxy: FaultProxy) -> None:
    upstream, received = recorder
    head, _, body = REQUEST.partition(b"\r\n\r\n")
    head += b"\r\nExpect: 100-continue\r\n\r\n"
    with socket.create_connection(("127.0.0.1", fault_proxy.endpoint(upstream).port), timeout=10) as client:
        client.sendall(head)
        assert read_until(client, b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(body)
        assert read_until(client, ANSWER[-9:]) == ANSWER
    assert bytes(received) == head + body
    fault_proxy.close()


def test_proxy_store_that_is_not_there_breaks_the_connection(fault_proxy: FaultProxy) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    gone = Bucket(fault_proxy.endpoint(Endpoint("gone", "s3://bucket", {}, real=False, port=port)))
    with pytest.raises(ConnectionResetError):
        gone.put("a")


def test_proxy_closed_breaks_what_it_holds(direct: Bucket) -> None:
    proxy = FaultProxy(Rule(Fault.TIMEOUT))
    bucket = Bucket(proxy.endpoint(direct.endpoint))
    ended: list[BaseException] = []

    def put() -> None:
        try:
            bucket.put("a")
        except OSError as error:
            ended.append(error)

    waiting = threading.Thread(target=put)
    waiting.start()
    while not proxy.log:
        time.sleep(0.01)
    proxy.close()
    waiting.join(timeout=10)
    assert len(ended) == 1
    with pytest.raises(ConnectionRefusedError):
        bucket.put("a")
    proxy.close()
