"""Shared fixtures: the embedded model and encoder, a small index, and a real S3 server on loopback."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock
from hypothesis import settings
from pyarrow import fs

from pipeline.config.sections import StorageConfig
from pipeline.storage.location import Location, locate
from tests.support.indexes import save, unit_vectors
from tests.support.s3 import S3Server, serving_s3

# A Ray cluster that happens to run on this machine is none of the tests' business.
os.environ["RAY_ADDRESS"] = "local"
# Commands in the background of a shell ignore Ctrl-C, and so would the commands that tests start and interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Tests judge values, never the time that they take.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
DEMO = Path(__file__).parents[1] / "infra" / "demo"


@pytest.fixture(scope="session")
def demo_model() -> Path:
    from pipeline.demo_models import build_demo_model

    return build_demo_model()


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
    table = passages.take(pa.array(chosen))
    words = [len(text.split()) for text in table["text"].to_pylist()]
    pq.write_table(table.append_column("words", pa.array(words)), file)
    return file


@pytest.fixture(scope="session")
def small_index(tmp_path_factory: pytest.TempPathFactory, small_corpus: Path) -> Path:
    """Two shards of the small corpus, with words, built once by the job and shared by parallel test processes."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "small_index"
    command = [sys.executable, "-m", "jobs.build_index", "--passages", str(small_corpus), "--output", str(folder)]
    with FileLock(f"{folder}.lock"):
        if not (folder / "index.json").exists():
            subprocess.run([*command, "--shards", "2", "--lexical", "--metadata", "words"], check=True, timeout=560)
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


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with serving_s3(tmp_path_factory.mktemp("s3")) as server:
        yield server
