"""Emulators of Google's and Azure's object stores on loopback."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.sections import StorageConfig
from pipeline.storage.location import locate

# The account and the key of every Azurite, which are no secret:
# https://learn.microsoft.com/en-us/azure/storage/common/storage-connect-azurite
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
_GOOGLE = """
import sys
from gcp_storage_emulator.server import create_server
create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket="bucket").run()
"""


@dataclass(frozen=True)
class CloudStore:
    """A running emulator with a bucket.

    Attributes:
        place: URI of the bucket.
        environment: standard variables that lead a client here.
        process: the emulator.
    """

    place: str
    environment: dict[str, str]
    process: subprocess.Popen[bytes] = field(compare=False)

    def filesystem(self) -> Any:
        """A client of it."""
        with pytest.MonkeyPatch.context() as patched:
            for name, value in self.environment.items():
                patched.setenv(name, value)
            return locate(self.place, StorageConfig()).filesystem


def find_azurite() -> str | None:
    """Azurite is an npm package: ``npm install -g azurite``."""
    return shutil.which("azurite-blob")


AZURITE = pytest.mark.skipif(find_azurite() is None, reason="needs azurite-blob (npm install -g azurite)")


@contextmanager
def serving(kind: str, folder: Path) -> Iterator[CloudStore]:
    """Run an emulator of ``google`` or ``azure`` while the context is."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"
    if kind == "google":
        command, place = [sys.executable, "-c", _GOOGLE, str(port)], "gs://bucket"
        variables = {"STORAGE_EMULATOR_HOST": endpoint}
    else:
        azurite = find_azurite()
        assert azurite is not None
        where = ["--location", str(folder), "--blobHost", "127.0.0.1", "--blobPort", str(port)]
        command = [azurite, "--silent", "--disableTelemetry", "--skipApiVersionCheck", *where]
        place, connection = (
            "abfss://bucket",
            f"AccountName={ACCOUNT};AccountKey={KEY};BlobEndpoint={endpoint}/{ACCOUNT}",
        )
        variables = {"AZURE_STORAGE_CONNECTION_STRING": connection}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ)
    try:
        _wait_for(port, process)
        store = CloudStore(place, variables, process)
        if kind == "azure":
            store.filesystem().create_dir("bucket")
        yield store
    finally:
        process.terminate()
        process.wait(timeout=10)


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        assert process.poll() is None
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError
