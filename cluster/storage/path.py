"""One path type for every place that data lives in: a folder, or a prefix in a bucket.

A `StoragePath` is a value: it normalises and joins, and never touches the place it names. The verbs are
in `objects` and `create`.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from cluster.storage.redaction import holds_credential
from schemas.errors import ManifestError

_WEB = frozenset({"http", "https"})
# Other names of the same store, which is asked in one way.
_ALIASES = {"s3a": "s3", "gcs": "gs"}
_SCHEME = re.compile(r"^([a-zA-Z][a-zA-Z0-9+.-]+)://(.*)$", re.DOTALL)


@dataclass(frozen=True, slots=True, order=True)
class StoragePath:
    """`scheme://segments`, with no doubled slash, no `.` and no `..` in it.

    Build one with `StoragePath.parse`; the constructor trusts its arguments.
    """

    scheme: str
    key: str

    @classmethod
    def parse(cls, text: str | os.PathLike[str], base: Path | None = None) -> StoragePath:
        """Read a URL or a local path; a relative local path is taken from `base`.

        Raises:
            ManifestError: the text is empty or no path, or a URL climbs with `..` or holds a credential.
        """
        text = os.fspath(text)
        if not text.strip():
            raise ManifestError("an empty path was given, expected a folder or a URL", "name a path")
        try:
            if b"\0" in os.fsencode(text):
                raise ManifestError(f"the path {text!r} has a null character", "name another path")
        except UnicodeEncodeError as error:
            raise ManifestError(f"the path {text!r} is no text that a file name can be", "name another path") from error
        match = _SCHEME.match(text)
        if match is None or match[1] in ("file", "local"):
            local = Path(match[2] if match else text).expanduser()
            absolute = local if local.is_absolute() else (base or Path.cwd()) / local
            return cls("file", os.path.normpath(absolute))
        if holds_credential(text):
            # Not repeated in the message.
            raise ManifestError(
                f"a {match[1]}:// URL holds a credential",
                "leave them out: credentials come from the provider's own chain (environment, profile, role)",
            )
        segments = [part for part in match[2].split("/") if part not in ("", ".")]
        if ".." in segments:
            raise ManifestError(f"the URL {text!r} climbs with '..'", "name the target directly")
        scheme, key = _ALIASES.get(match[1].lower(), match[1].lower()), "/".join(segments)
        # What fsspec calls a path on the web is the whole URL.
        return cls(scheme, f"{scheme}://{key}" if scheme in _WEB else key)

    def __truediv__(self, part: str) -> StoragePath:
        parts = [piece for piece in part.split("/") if piece not in ("", ".")]
        if ".." in parts:
            raise ValueError(f"{part!r} climbs out of {self}")
        return StoragePath(self.scheme, "/".join([self.key.rstrip("/"), *parts]))

    @property
    def name(self) -> str:
        """The last segment."""
        return self.key.rsplit("/", 1)[-1]

    @property
    def parent(self) -> StoragePath:
        """The path without its last segment."""
        return StoragePath(self.scheme, self.key.rsplit("/", 1)[0] or "/")

    @property
    def is_local(self) -> bool:
        """Whether the path is on this machine's file system."""
        return self.scheme == "file"

    @property
    def is_web(self) -> bool:
        """Whether it is the URL of a page or a file on the web, where nothing can be written."""
        return self.scheme in _WEB

    @property
    def local(self) -> Path:
        """The path as a `pathlib.Path`; only for local ones."""
        if not self.is_local:
            raise ValueError(f"{self} is not on this machine")
        return Path(self.key)

    def relative_to(self, root: StoragePath) -> str:
        """The key below `root`.

        Raises:
            ValueError: the path is not below `root`.
        """
        prefix = root.key.rstrip("/") + "/"
        if self.scheme != root.scheme or not self.key.startswith(prefix):
            raise ValueError(f"{self} is not below {root}")
        return self.key[len(prefix) :]

    def __str__(self) -> str:
        return self.key if self.is_local or self.is_web else f"{self.scheme}://{self.key}"
