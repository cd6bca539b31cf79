"""Times are read faster than botocore does, and to the same moments."""

import pytest

pytest.importorskip("s3fs")

from botocore.utils import parse_timestamp

from cluster.storage.objects import _session


@pytest.mark.parametrize(
    "told",
    [
        "2026-01-02T03:04:05.678Z",
        "2026-01-02T03:04:05Z",
        "2026-01-02T03:04:05.678901+02:00",
        "Fri, 02 Jan 2026 03:04:05 GMT",
        1767323045,
        1767323045.5,
        "1767323045",
    ],
)
def test_moment_is_the_one_that_botocore_reads(told: str | float) -> None:
    parser = _session().get_component("response_parser_factory").create_parser("rest-xml")
    assert parser._timestamp_parser is not parse_timestamp
    assert parser._timestamp_parser(told) == parse_timestamp(told)
