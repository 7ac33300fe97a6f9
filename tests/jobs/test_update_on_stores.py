"""The life of an index on an object store: built, updated twice, compacted and pruned."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.sections import RetrievalConfig, StorageConfig
from pipeline.retrieval.fusion import QueryBatch, retrieve_fused
from pipeline.retrieval.index import PassageIndex
from pipeline.retrieval.manifest import read_manifest
from pipeline.storage.location import locate
from tests.support.building import given_vectors
from tests.support.clouds import AZURITE, serving
from tests.support.s3 import S3Server

pytestmark = pytest.mark.slow

ROWS, MORE = 60, 12


def call(job: str, *options: str) -> None:
    command = [sys.executable, "-m", f"jobs.{job}", *options]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env={**os.environ})
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.fixture(params=["s3", "google", pytest.param("azure", marks=AZURITE)])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URI of an empty bucket of an object store that this process reaches by its variables."""
    with contextlib.ExitStack() as stack:
        if request.param == "s3":
            server: S3Server = request.getfixturevalue("s3")
            place, environment = f"s3://{server.bucket}", server.environment
        else:
            running = stack.enter_context(serving(request.param, tmp_path))
            place, environment = running.place, running.environment
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield place


def test_index_on_an_object_store_lives(store: str, tmp_path: Path) -> None:
    index, bucket = f"{store}/index", locate(store, StorageConfig())
    base, vectors = given_vectors(ROWS)
    more, new = given_vectors(MORE, ROWS)
    for name, table in (("base", base), ("more", more), ("gone", pa.table({"id": ["3", "61", "59"]}))):
        pq.write_table(table, f"{bucket.path}/{name}/part.parquet", filesystem=bucket.filesystem)
    call(
        "build_index",
        "--passages",
        f"{store}/base",
        "--output",
        index,
        "--shards",
        "2",
        "--lexical",
        "--embeddings",
        "vector",
    )
    folder, retrieval = locate(index, StorageConfig()), RetrievalConfig(device="cpu", cache=str(tmp_path / "cache"))
    first = read_manifest(folder)

    def find(digest: str | None = None) -> list[list[str]]:
        opened = PassageIndex.open(folder, retrieval, digest=digest)
        queries = np.random.default_rng(3).normal(size=(5, 384)).astype(np.float32)
        found = retrieve_fused(opened, QueryBatch(queries), [10] * 5, retrieval)
        return [[one.passage.id for one in of_query] for of_query in found]

    def rank(passages: np.ndarray, gone: list[int]) -> list[list[str]]:
        scores = np.random.default_rng(3).normal(size=(5, 384)).astype(np.float32) @ passages.T
        scores[:, gone] = -np.inf
        return [[str(row) for row in rows[:10]] for rows in np.argsort(-scores, axis=1)]

    call("update_index", "--index", index, "--add", f"{store}/more")
    call("update_index", "--index", index, "--remove", f"{store}/gone", "--strict")
    wanted = rank(np.concatenate([vectors, new]), [3, 61, 59])
    assert find() == wanted
    assert find(first.compute_digest()) == rank(vectors, [])
    call("update_index", "--index", index, "--compact")
    assert find() == wanted
    assert [shard.kept for shard in read_manifest(folder).shards] == [34, 35]
    call("update_index", "--index", index, "--prune")
    time.sleep(10)  # rclone's store hides files for a while after others were deleted
    assert find() == wanted
    names = {file.path.removeprefix(f"{folder.path}/") for file in folder.list_files()}
    last = {name for shard in read_manifest(folder).shards for name, _, _ in shard.list_files()}
    # rclone makes a file of the marker that Arrow puts where a folder's last file was deleted.
    assert names - {"update-00002"} == {"index.json", *last}
