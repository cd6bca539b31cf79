"""What the servers that speak S3 share: how a client finds them, and how a bucket is made."""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import botocore.session
from botocore.config import Config

from tests.support.servers.server import Server

REGION = "us-east-1"


@functools.cache
def _session() -> botocore.session.Session:
    # It keeps what it has read of the API's description, which is most of the time that a client takes to make.
    return botocore.session.Session()


@contextlib.contextmanager
def s3_client(environment: Mapping[str, str], read_timeout: float = 60) -> Iterator[Any]:
    """A botocore client that tries everything once, so that a test sees what the server did and not a retry of it."""
    client = _session().create_client(
        "s3",
        region_name=environment["AWS_DEFAULT_REGION"],
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        config=Config(retries={"total_max_attempts": 1}, read_timeout=read_timeout, max_pool_connections=32),
    )
    with contextlib.closing(client):
        yield client


class S3Server(Server):
    """A server with an S3 API; subclasses set a key and a secret before they start."""

    scheme = "s3"
    key = "kilobasis"
    secret = "kilobasis-test"
    # Where clients find it.
    host = "127.0.0.1"

    @property
    def environment(self) -> Mapping[str, str]:
        """The AWS variables; without the last one a client may look for an instance's metadata service."""
        return {
            "AWS_ENDPOINT_URL": f"http://{self.host}:{self.port}",
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def make_bucket(self, name: str) -> None:
        """Make a bucket.

        Not by s3fs: with a region in its arguments it names a location, which Ceph refuses.
        """
        with s3_client(self.environment) as client:
            client.create_bucket(Bucket=name)
