"""Secrets that can be found again wherever they leak to, and a server that gives away what it is told."""

import base64
import functools
import hashlib
import http.server
import json
import threading
import urllib.parse
import xml.sax.saxutils
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

ACCOUNT = "kilobasis"
PIECE = 16


@functools.cache
def private_key() -> str:
    """An RSA key as Google's credentials hold it."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    form = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()).decode()


def _letters(count: int) -> str:
    """Letters that look like chance, the same every time."""
    digest = hashlib.shake_256(b"canary").digest(count)
    return base64.b64encode(digest).decode()[:count]


@dataclass(frozen=True)
class Canaries:
    """Ten secrets of a user's.

    Attributes:
        values: Name -> what may be seen nowhere.
        environment: The variables that hold those which come in variables.
    """

    values: Mapping[str, str]
    environment: Mapping[str, str] = field(default_factory=dict)

    def leaked(self, text: str) -> list[str]:
        """Names of the secrets that a text holds, or a part of: as they are, as they stand in a URL, or in JSON."""
        return [name for name, value in self.values.items() if any(piece in text for piece in pieces(value))]

    def leaked_below(self, folder: Path) -> list[str]:
        """The same for the names and the contents of all files below a folder."""
        found = []
        for path in sorted(folder.rglob("*")):
            text = str(path) + (path.read_bytes().decode("utf-8", "replace") if path.is_file() else "")
            found += [f"{name} in {path.relative_to(folder)}" for name in self.leaked(text)]
        return found


def forms(value: str) -> set[str]:
    """How a secret may look in other clothes."""
    quoted = {urllib.parse.quote(value), urllib.parse.quote(value, safe=""), json.dumps(value)[1:-1]}
    return {value, *quoted, base64.b64encode(value.encode()).decode().rstrip("=")}


def pieces(value: str) -> set[str]:
    """What a text holds that holds a secret, or 31 characters of one on end."""
    found = set()
    for form in forms(value):
        found |= {form[at : at + PIECE] for at in range(0, max(1, len(form) - PIECE + 1), PIECE)}
    return found


def canaries(folder: Path, port: int) -> Canaries:
    """Ten secrets; those of stores belong to endpoints at a port of this machine.

    Args:
        folder: Where Google's credentials are put down.
        port: Of a server, or one where nobody listens.
    """
    endpoint = f"http://127.0.0.1:{port}"
    account_key = base64.b64encode(b"canary of the azure account key, 64 bytes as Azure has it, +/+/+").decode()
    key = private_key()
    values = {
        "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG+bPxRfiCYcanarykey1",
        # As long as real ones: longer than most messages.
        "AWS_SESSION_TOKEN": "IQoJb3JpZ2luX2VjECAN/RYtoken//////////wEaCXVz+2" + _letters(460),
        "AZURE_STORAGE_CONNECTION_STRING": account_key,
        "AZURE_STORAGE_SAS_TOKEN": "c2FzY2FuYXJ5c2lnbmF0dXJlMzMzMzMz+/3=",
        # A line of it is enough to go by.
        "GOOGLE_APPLICATION_CREDENTIALS": key.splitlines()[10],
        "HF_TOKEN": "hf_canaryQxRwLvKzTjMyNbGpHdFsWcXq4",
        "corpus password": "canary-corpus-Hunter5",
        "root password": "canary-root-Hunter6",
        "RAY_AUTH_TOKEN": "canary0ray7" * 6,
        "signed URL": "canary8signature%2Bof%2Fa%2Furl%3D",
    }
    credentials = folder / "google.json"
    credentials.write_text(
        json.dumps(
            {
                "type": "service_account",
                "project_id": "kilobasis",
                "private_key_id": "0",
                "private_key": key,
                "client_email": "kilobasis@kilobasis.invalid",
                "client_id": "0",
                "token_uri": f"{endpoint}/token",
            }
        )
    )
    parts = {
        "DefaultEndpointsProtocol": "http",
        "AccountName": ACCOUNT,
        "AccountKey": account_key,
        "BlobEndpoint": f"{endpoint}/{ACCOUNT}",
    }
    environment = {
        "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AZURE_STORAGE_CONNECTION_STRING": ";".join(f"{name}={value}" for name, value in parts.items()),
        "AZURE_STORAGE_SAS_TOKEN": "sv=2024-11-04&se=2030-01-01&sig="
        + urllib.parse.quote(values["AZURE_STORAGE_SAS_TOKEN"]),
        "GOOGLE_APPLICATION_CREDENTIALS": str(credentials),
        "STORAGE_EMULATOR_HOST": endpoint,
    }
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "RAY_AUTH_TOKEN"):
        environment[name] = values[name]
    return Canaries(values, environment)


class _Echo(http.server.BaseHTTPRequestHandler):
    """Refuses everything, and says why in the words that it was given: the address, and every header."""

    server: "Gossip"

    def _refuse(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.heard.append(f"{self.path} {self.headers}")
        # Messages are cut somewhere, so what matters comes first.
        names = sorted(self.headers, key=lambda name: not ("token" in name.lower() or "auth" in name.lower()))
        told = " ".join([*(f"{name}: {self.headers[name]}" for name in names), self.path])
        message = xml.sax.saxutils.escape(f"you sent {told}")
        body = f"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>{message}</Message></Error>".encode()
        if "json" in self.headers.get("Accept", "") or self.path.startswith(("/storage", "/token", "/api")):
            body = json.dumps(
                {"error": {"code": 403, "message": f"you sent {told}"}, "error_description": told}
            ).encode()
        self.send_response(self.server.status, f"you sent {told}"[:900])
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/xml")
        self.send_header("X-Error-Message", f"you sent {told}"[:900])
        self.send_header("X-Error-Code", "GatedRepo")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_OPTIONS = _refuse

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server calls it so
        """Silent."""


class Gossip(http.server.ThreadingHTTPServer):
    """The server, and what it heard."""

    daemon_threads = True

    def __init__(self, status: int) -> None:
        super().__init__(("127.0.0.1", 0), _Echo)
        self.status = status
        self.heard: list[str] = []


@contextmanager
def gossip(status: int = 403) -> Iterator[Gossip]:
    """A server that denies everything with a status."""
    with Gossip(status) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
