"""Keeps secrets out of what is said: every text of a foreign library passes through here before it is shown."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

HIDDEN = "***"

# Names of environment variables whose values are secrets, whichever library reads them.
_SECRET_NAME = re.compile(
    r"SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL|ACCOUNT_KEY|STORAGE_KEY|ACCESS_KEY|API_KEY|SAS|CONNECTION_STRING"
)
_SHORTEST = 6

_SHAPES = (
    # https://user:password@host
    re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"),
    # Signed URLs: S3, Google and Azure.
    re.compile(
        r"(?i)(?<=[?&;])((?:x-amz-(?:signature|credential|security-token)|x-goog-(?:signature|credential)|sig|se|sp|awsaccesskeyid|signature|access_token)=)[^&\s'\"]+"
    ),
    re.compile(
        r"(?i)(\b(?:accountkey|sharedaccesssignature|aws_secret_access_key|secret_access_key)\s*[=:]\s*)[^;\s'\",]+"
    ),
    re.compile(
        r"(?i)(\bauthorization['\"]?\s*[=:]\s*['\"]?(?:bearer\s+|basic\s+|aws4-hmac-sha256\s+|sharedkey\s+)?)[^\s'\"]+"
    ),
)


def redact(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """The text without secrets: values of secret environment variables, passwords in URLs, signatures, keys.

    >>> redact("cannot open https://me:hunter2@host/x?sig=abcdef&v=1", {})
    'cannot open https://***@host/x?sig=***&v=1'
    >>> redact("denied for s3cr3t-value", {"AWS_SECRET_ACCESS_KEY": "s3cr3t-value"})
    'denied for ***'
    """
    secrets = [value for name, value in environment.items() if _SECRET_NAME.search(name.upper())]
    for secret in sorted({value for value in secrets if len(value) >= _SHORTEST}, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    for shape in _SHAPES:
        text = shape.sub(lambda found: (found[1] if found.re.groups else "") + HIDDEN, text)
    return text
