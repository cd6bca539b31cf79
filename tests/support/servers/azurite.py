"""Azurite: Microsoft's own emulator of Azure Blob Storage. It checks keys and conditions."""

import base64
import secrets
import shutil
from collections.abc import Mapping
from importlib.util import find_spec

from tests.support.servers.server import INSTALLED, Server

MAIN = INSTALLED / "azurite" / "node_modules" / "azurite" / "dist" / "src" / "blob" / "main.js"
ACCOUNT = "kilobasis"


class AzuriteServer(Server):
    """The blob service, all in memory."""

    name = "azurite"
    scheme = "az"
    real = False

    def __init__(self) -> None:
        self.key = base64.b64encode(secrets.token_bytes(64)).decode()
        super().__init__()

    @classmethod
    def missing(cls) -> str | None:
        """Node runs it, npm installs it."""
        if shutil.which("node") is None:
            return "Azurite needs node 20 or newer and npm (then: make servers)"
        if not MAIN.exists():
            return "Azurite is not installed (make servers)"
        return None if find_spec("adlfs") else "adlfs is not installed (pip install -e '.[az]')"

    @property
    def environment(self) -> Mapping[str, str]:
        """The connection string, which adlfs and Azure's own libraries take from here."""
        parts = {
            "DefaultEndpointsProtocol": "http",
            "AccountName": ACCOUNT,
            "AccountKey": self.key,
            "BlobEndpoint": f"http://127.0.0.1:{self.port}/{ACCOUNT}",
        }
        return {"AZURE_STORAGE_CONNECTION_STRING": ";".join(f"{name}={value}" for name, value in parts.items())}

    def start(self) -> None:
        """Start it; every start is empty."""
        where = ["--blobHost", "127.0.0.1", "--blobPort", str(self.port), "--inMemoryPersistence"]
        manner = ["--skipApiVersionCheck", "--disableTelemetry", "--silent"]
        accounts = {"AZURITE_ACCOUNTS": f"{ACCOUNT}:{self.key}"}
        self.processes.start("azurite", "node", MAIN, *where, *manner, environment=accounts)
        self.processes.wait_for(self.port)

    def make_bucket(self, name: str) -> None:
        """Make a container."""
        from azure.storage.blob import BlobServiceClient

        text = self.environment["AZURE_STORAGE_CONNECTION_STRING"]
        with BlobServiceClient.from_connection_string(text) as client:
            client.create_container(name)
