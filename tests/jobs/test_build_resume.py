"""Builds that end before they are done, and the same command again."""

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import Result

from pipeline.config.sections import RetrievalConfig
from pipeline.indexing.build_pool import ShardBuilder
from pipeline.indexing.passages import ShardPlan
from pipeline.retrieval.index import PassageIndex
from pipeline.retrieval.manifest import read_manifest
from pipeline.storage.lease import Lease
from tests.support.building import given_vectors, run
from tests.support.indexes import place, retrieve
from tests.support.leases import finishing_elsewhere

pytestmark = pytest.mark.usefixtures("lasting_ray")


@pytest.fixture
def interrupted(
    with_vectors: tuple[Path, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, list[str]]:
    """An output folder whose build ended when shard 1 of three was not there yet; and its command's options."""
    options = ["--embeddings", "vector", "--factory", "IVF8,Flat", "--shards", "3"]

    def killed(*_: object) -> None:
        raise OSError("the machine is gone")

    with monkeypatch.context() as patched:
        patched.setattr("pipeline.indexing.build_pool.write_manifest", killed)
        result = run(with_vectors[0], tmp_path / "out", *options)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "error: the machine is gone"
    assert not (tmp_path / "out" / "index.json").exists()
    (tmp_path / "out" / "_build" / "shard-00001.json").unlink()
    (tmp_path / "out" / "shard-00001.faiss").write_bytes(b"half")
    (tmp_path / "out" / ".building-xyz").mkdir()
    return tmp_path / "out", options


def test_interrupted_build_resumes_with_the_missing_shards(
    interrupted: tuple[Path, list[str]], with_vectors: tuple[Path, np.ndarray], caplog: pytest.LogCaptureFixture
) -> None:
    (out, options), (source, vectors) = interrupted, with_vectors
    before = {file.name: file.stat().st_mtime_ns for file in out.glob("shard-*")}
    with caplog.at_level(logging.INFO, "pipeline.indexing.build_pool"):
        result = run(source, out, *options)
    assert result.exit_code == 0, result.stderr
    assert "resuming an interrupted build: 2 of 3 shards are done" in caplog.text
    after = {file.name: file.stat().st_mtime_ns for file in out.glob("shard-*")}
    assert {name for name in after if after[name] != before.get(name)} == {
        "shard-00001.faiss",
        "shard-00001.passages.arrow",
    }
    assert {file.name for file in out.iterdir()} == {"index.json", *after}
    index = PassageIndex.open(place(out), RetrievalConfig(device="cpu", search="nprobe=8"))
    assert [hits[0].passage.id for hits in retrieve(index, vectors, 1)] == [str(n) for n in range(300)]


@pytest.mark.slow
def test_interrupted_rebuild_resumes(
    interrupted: tuple[Path, list[str]], with_vectors: tuple[Path, np.ndarray]
) -> None:
    (out, options), (source, _) = interrupted, with_vectors
    before = (out / "shard-00000.faiss").stat().st_mtime_ns
    assert run(source, out, *options, "--overwrite").exit_code == 0
    assert (out / "shard-00000.faiss").stat().st_mtime_ns == before
    assert run(source, out, *options, "--overwrite").exit_code == 0
    assert (out / "shard-00000.faiss").stat().st_mtime_ns != before


class MortalBuilder(ShardBuilder):
    """Dies in the middle of shard 1, the first time."""

    def read_batches(self, shard: ShardPlan, index: Any) -> Iterator[tuple[pa.RecordBatch, np.ndarray]]:
        for batch in super().read_batches(shard, index):
            yield batch
            mark = Path(self.plan.output.path) / "died"
            if shard.number == 1 and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)


def test_shard_of_a_killed_builder_is_rebuilt(
    with_vectors: tuple[Path, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, vectors = with_vectors
    monkeypatch.setattr("pipeline.indexing.build_pool.ShardBuilder", MortalBuilder)
    result = run(source, tmp_path / "out", "--embeddings", "vector", "--shards", "2")
    assert result.exit_code == 0, result.stderr
    (tmp_path / "out" / "died").unlink()
    names = {f"shard-0000{n}.{kind}" for n in (0, 1) for kind in ("faiss", "passages.arrow")}
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"index.json", *names}
    index = PassageIndex.open(place(tmp_path / "out"), RetrievalConfig(device="cpu"))
    assert [hits[0].passage.id for hits in retrieve(index, vectors, 1)] == [str(n) for n in range(300)]


def test_interrupted_build_with_other_options_is_not_resumed(
    interrupted: tuple[Path, list[str]], with_vectors: tuple[Path, np.ndarray]
) -> None:
    (out, options), (source, _) = interrupted, with_vectors
    pq.write_table(given_vectors(10, 300)[0], source / "c.parquet")
    changed = [option if option != "IVF8,Flat" else "Flat" for option in options]
    refused_last(run(source, out, *changed), "holds an unfinished build that differs in factory, passages; pass --over")
    assert run(source, out, *changed, "--overwrite").exit_code == 0
    assert read_manifest(place(out)).passages == 310
    assert not (out / "_build").exists()


def refused_last(result: Result, part: str) -> None:
    assert result.exit_code == 2
    assert part in result.stderr.splitlines()[-1]


def test_build_with_a_held_lease_stops(
    with_vectors: tuple[Path, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("pipeline.indexing.build_pool.connect")  # what would start Ray
    with Lease(place(tmp_path / "out")):
        result = run(with_vectors[0], tmp_path / "out", "--embeddings", "vector")
    refused_last(result, "another run is using this output (process")
    assert not (tmp_path / "out" / "_build").exists()


def test_build_finished_by_another_while_waiting_leaves_the_index_unchanged(
    with_vectors: tuple[Path, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.storage.lease.EXPIRY_S", 20.0)
    monkeypatch.setattr("pipeline.storage.lease.HEARTBEAT_S", 0.3)
    assert run(with_vectors[0], tmp_path / "out", "--embeddings", "vector").exit_code == 0
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    other = finishing_elsewhere(tmp_path / "out", tmp_path / "aside")
    refused_last(
        run(with_vectors[0], tmp_path / "out", "--embeddings", "vector"), "already holds an index; pass --overwrite"
    )
    other.join()
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()} == before
