"""Keeps secrets out of what is said: every text of a foreign library passes through here before it is shown."""

from __future__ import annotations

import os
import re
import urllib.parse
from collections.abc import Iterator, Mapping

HIDDEN = "***"

# Names of environment variables whose values are secrets, whichever library reads them.
_SECRET_NAME = re.compile(
    r"SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL|ACCOUNT_KEY|STORAGE_KEY|ACCESS_KEY|API_KEY|SAS|CONNECTION_STRING"
)
_SHORTEST = 6
# So much of a secret on end is a secret as well: libraries cut what they are told.
_PIECE = 16
_SIGNED = (
    r"x-amz-(?:signature|credential|security-token)|x-goog-(?:signature|credential)|sig|se|sp|awsaccesskeyid|signature"
    r"|[a-z_-]*token|[a-z_-]*secret|api_?key|password"
)
_CREDENTIAL = re.compile(rf"(?i)://[^/@\s]+:[^/@\s]+@|\b(?:AKIA|ASIA)[0-9A-Z]{{16}}\b|[?&;](?:{_SIGNED})=")

_SHAPES = (
    # https://user:password@host
    re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"),
    # Signed URLs: S3, Google, Azure, and whoever calls it a token or a key.
    re.compile(rf"(?i)(?<=[?&;])((?:{_SIGNED})=)[^&\s'\"]+"),
    re.compile(
        r"(?i)(\b(?:accountkey|sharedaccesssignature|aws_secret_access_key|secret_access_key)\s*[=:]\s*)[^;\s'\",]+"
    ),
    re.compile(
        r"(?i)(\bauthorization['\"]?\s*[=:]\s*['\"]?)(?:(?:bearer|basic|aws4-hmac-sha256|sharedkey)\s+)?[^\s'\"]+"
        r"(?:\s+(?:signedheaders|signature)=[^\s'\"]+)*"
    ),
)


def redact(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """The text without secrets: values of secret environment variables, passwords in URLs, signatures, keys.

    >>> redact("cannot open https://me:hunter2@host/x?sig=abcdef&v=1", {})
    'cannot open https://***@host/x?sig=***&v=1'
    >>> redact("denied for s3cr3t-value", {"AWS_SECRET_ACCESS_KEY": "s3cr3t-value"})
    'denied for ***'
    """
    values = [value for name, value in environment.items() if _SECRET_NAME.search(name.upper())]
    secrets = {part for value in values for part in _parts(value)}
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    # Where a secret lies is not what it is, and other names begin in the same way.
    told = [value for value in values if not value.startswith("/") and "://" not in value]
    text = _without_pieces(text, {part for value in told for part in _parts(value)})
    for shape in _SHAPES:
        text = shape.sub(lambda found: (found[1] if found.re.groups else "") + HIDDEN, text)
    return text


def first_line(text: str, longest: int) -> str:
    r"""The first line of a text that says something, without secrets, and only then cut: half a secret is not known.

    >>> first_line("\n  no such host \nTraceback", 9)
    'no such h'
    """
    return next((line.strip() for line in redact(text).splitlines() if line.strip()), "")[:longest]


def holds_credential(text: str) -> bool:
    """Whether a URL brings what should come from the provider's own chain.

    >>> holds_credential("https://host/x.jsonl?sig=abcdef"), holds_credential("s3://bucket/x.jsonl")
    (True, False)
    """
    return _CREDENTIAL.search(text) is not None


def _without_pieces(text: str, secrets: set[str]) -> str:
    """The text without what it has of secrets on end, where that is long enough to be no chance."""
    kept, done = "", 0
    for start, end in sorted(span for secret in secrets for span in _shared(text, secret)):
        if start >= done:
            kept += text[done:start] + HIDDEN
        done = max(done, end)
    return kept + text[done:]


def _shared(text: str, secret: str) -> Iterator[tuple[int, int]]:
    """Where the text and the secret agree for long."""
    for at in range(0, len(secret) - _PIECE + 1, _PIECE):
        start = text.find(secret[at : at + _PIECE])
        while start >= 0:
            before, behind = _agreement(text[:start][::-1], secret[:at][::-1]), _agreement(text[start:], secret[at:])
            yield start - before, start + behind
            start = text.find(secret[at : at + _PIECE], start + behind)


def _agreement(one: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    pairs = zip(one, other, strict=False)
    return next((at for at, (left, right) in enumerate(pairs) if left != right), min(len(one), len(other)))


def _parts(value: str) -> Iterator[str]:
    """A secret, the values in it where it is a list of them (a connection string), and each as URLs have it."""
    listed = [field.partition("=")[2] for field in value.split(";") if re.match(r"(?i)[a-z]*(key|signature)=", field)]
    for each in (value, *listed):
        for form in (each, urllib.parse.quote(each), urllib.parse.quote(each, safe=""), urllib.parse.unquote(each)):
            if len(form) >= _SHORTEST:
                yield form
