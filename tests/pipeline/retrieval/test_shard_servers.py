"""The partitioned topology over real Ray actors on one machine."""

import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.sections import ExecutionConfig, StorageConfig
from pipeline.indexing.update import UpdateRequest, run_update
from pipeline.retrieval.fusion import QueryBatch
from pipeline.retrieval.hits import Hit
from pipeline.retrieval.index import PassageIndex
from pipeline.retrieval.manifest import read_manifest
from pipeline.retrieval.shard_servers import (
    IndexLostError,
    PartitionedIndex,
    ServedIndex,
    ShardServer,
    assign_shards,
    merge_hits,
    start_servers,
)
from pipeline.storage.location import Location, locate
from tests.support.indexes import CPU, retrieve, save, unit_vectors

NO_CPUS = ExecutionConfig(cpus_per_server=0)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    was_running = ray.is_initialized()
    if not was_running:
        ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR")
    yield
    if not was_running:
        ray.shutdown()


def start(index: Location, count: int) -> list[Any]:
    manifest = read_manifest(index)
    served = ServedIndex(index.uri, manifest.compute_digest(), len(manifest.shards), CPU, StorageConfig())
    return start_servers(served, [None] * count, NO_CPUS)


@given(st.integers(1, 20), st.integers(1, 20))
def test_shards_are_assigned_once_and_evenly(shards: int, servers: int) -> None:
    dealt = assign_shards(shards, servers)
    assert sorted(number for numbers in dealt for number in numbers) == list(range(shards))
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


scores = st.sampled_from([0.0, 0.5, 1.0])


@given(st.lists(st.lists(st.tuples(scores, st.integers(0, 5)), max_size=6), min_size=1, max_size=4), st.integers(1, 8))
def test_merged_hits_are_the_best_with_ties_by_shard_then_row(answers: list[list[tuple[float, int]]], k: int) -> None:
    parts = [
        sorted([Hit(score, n, row) for score, row in part], key=lambda hit: hit.order) for n, part in enumerate(answers)
    ]
    everything = sorted((hit for part in parts for hit in part), key=lambda hit: (-hit.score, hit.shard, hit.row))
    assert merge_hits(parts, k) == everything[:k]


@pytest.fixture
def tied(folder: Location) -> tuple[Location, np.ndarray]:
    """90 vectors in five shards, each of them thrice, far apart: every score is contested."""
    vectors = np.tile(unit_vectors(30, seed=4), (3, 1))
    save(folder, [vectors[:10], vectors[10:37], vectors[37:40], vectors[40:75], vectors[75:]])
    return folder, vectors


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("count", [1, 2, 5])
def test_servers_rank_like_one_flat_index(tied: tuple[Location, np.ndarray], count: int) -> None:
    folder, vectors = tied
    queries = unit_vectors(70, seed=5)
    exact = queries @ vectors.T
    one = faiss.IndexFlatIP(16)
    one.add(vectors)
    faiss_scores, _ = one.search(queries, 8)
    found = retrieve(PartitionedIndex(read_manifest(folder), start(folder, count)), queries, 8)
    assert found == retrieve(PassageIndex.open(folder, CPU), queries, 8)
    for hits, row_scores, flat in zip(found, exact, faiss_scores, strict=True):
        wanted = sorted(range(90), key=lambda row: (-np.round(row_scores[row], 5), row))[:8]
        assert [hit.passage.id for hit in hits] == [str(row) for row in wanted]
        assert [hit.rank for hit in hits] == list(range(1, 9))
        np.testing.assert_allclose(np.asarray([hit.score for hit in hits], float), flat, atol=1e-6)


@pytest.mark.usefixtures("cluster")
def test_servers_leave_removed_passages_out(saved: Location, tmp_path: Path) -> None:
    before = start(saved, 2)
    earlier, hits = read_manifest(saved), retrieve(PassageIndex.open(saved, CPU), unit_vectors(5, seed=3), 9)
    gone = [one.passage.id for of_query in hits for one in of_query[:2]]
    pq.write_table(pa.table({"id": gone}), tmp_path / "gone.parquet")
    run_update(UpdateRequest(saved.uri, remove=str(tmp_path / "gone.parquet")))
    whole = retrieve(PassageIndex.open(saved, CPU), unit_vectors(5, seed=3), 9)
    assert {one.passage.id for of_query in whole for one in of_query}.isdisjoint(gone)
    assert retrieve(PartitionedIndex(read_manifest(saved), start(saved, 2)), unit_vectors(5, seed=3), 9) == whole
    assert retrieve(PartitionedIndex(earlier, before), unit_vectors(5, seed=3), 9) == hits


class MortalServer(ShardServer):
    """Dies of a query whose first number is 9, the first time it is asked, and answers it when it is back."""

    def rank(self, batch: QueryBatch, depths: Sequence[int]) -> list[list[list[Hit]]]:
        folder = Path(self._folder.path)
        assert batch.vectors is not None
        if batch.vectors[0, 0] == 9 and not (mark := folder / f"died-{min(self._index.shards)}").exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().rank(batch, depths)

    def __init__(self, index: ServedIndex, numbers: list[int]) -> None:
        super().__init__(index, numbers)
        self._folder = locate(index.uri, index.storage)


@pytest.mark.usefixtures("cluster")
def test_search_survives_the_death_of_all_servers(saved: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.retrieval.shard_servers.ShardServer", MortalServer)
    index = PartitionedIndex(read_manifest(saved), start(saved, 2))
    queries = unit_vectors(4, seed=8)
    queries[0, 0] = 9
    assert retrieve(index, queries, 5) == retrieve(PassageIndex.open(saved, CPU), queries, 5)
    assert sorted(file.name for file in Path(saved.path).glob("died-*")) == ["died-0", "died-1"]


@pytest.mark.usefixtures("cluster")
def test_server_restarted_on_another_index_is_lost(saved: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.retrieval.shard_servers.ShardServer", MortalServer)
    index = PartitionedIndex(read_manifest(saved), start(saved, 1))
    save(saved, [unit_vectors(60, seed=1)])
    queries = unit_vectors(1)
    queries[0, 0] = 9
    with pytest.raises(IndexLostError, match="the index was replaced during the run"):
        retrieve(index, queries, 3)


@pytest.mark.usefixtures("cluster")
def test_lost_server_is_not_a_row_error(saved: Location) -> None:
    servers = start(saved, 2)
    ray.kill(servers[1])
    index = PartitionedIndex(read_manifest(saved), servers)
    with pytest.raises(IndexLostError, match="a shard server was lost"):
        retrieve(index, unit_vectors(1), 3)


@pytest.mark.usefixtures("cluster")
def test_damaged_shard_is_named_at_server_start(saved: Location) -> None:
    file = (saved / "shard-00002.faiss").path
    with open(file, "r+b") as stream:  # noqa: PTH123
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\xff")
    with pytest.raises(ray.exceptions.RayError, match=r"shard-00002.faiss: its SHA-256 differs from index.json"):
        start(saved, 3)
