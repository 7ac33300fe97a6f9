"""Indexes whose passages have further columns: filtered searches find what is left after filtering."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.sections import ExecutionConfig, RetrievalConfig, StorageConfig
from pipeline.decoding.types import RetrievedPassage
from pipeline.retrieval.filters import FilterError
from pipeline.retrieval.fusion import QueryBatch, SearchableIndex, retrieve_fused
from pipeline.retrieval.index import PassageIndex
from pipeline.retrieval.manifest import read_manifest
from pipeline.retrieval.retriever import IndexRetriever
from pipeline.retrieval.shard_servers import PartitionedIndex, ServedIndex, start_servers
from tests.support.building import given_vectors, run
from tests.support.indexes import place

pytestmark = pytest.mark.usefixtures("lasting_ray")

ROWS = 120
YEARS = [2000 + n % 7 for n in range(ROWS)]
TAGS = [["odd"] if n % 2 else ["even", "two"] for n in range(ROWS)]
CONDITIONS = (("year = 2003",), (), ("'two' in tags", "year > 2002"), ("year = 2003",), ("year > 3000",))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    table, _ = given_vectors(ROWS)
    texts = [f"Passage {n} about {['iron', 'gold', 'sea', 'wind'][n % 4]}." for n in range(ROWS)]
    table = table.set_column(2, "text", pa.array(texts))
    table = table.append_column("year", pa.array(YEARS)).append_column("tags", pa.array(TAGS))
    file = tmp_path_factory.mktemp("passages") / "passages.parquet"
    pq.write_table(table, file)
    return file


@pytest.fixture(scope="module")
def index(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("index") / "index"
    options = ["--embeddings", "vector", "--lexical", "--shards", "3", "--metadata", "year", "--metadata", "tags"]
    result = run(source, folder, *options, "--factory", "IVF4,Flat")
    assert result.exit_code == 0, result.stderr
    return folder


def ask(
    index: SearchableIndex, fusion: str, conditions: tuple[tuple[str, ...], ...], k: int
) -> list[list[RetrievedPassage]]:
    retrieval = RetrievalConfig.model_validate({"device": "cpu", "fusion": fusion})
    vectors = np.random.default_rng(7).normal(size=(5, 384)).astype(np.float32)
    words = [["iron"], ["gold", "17"], ["sea", "wind"], ["iron", "gold", "sea", "wind"], ["iron"]]
    batch = QueryBatch(vectors, words, conditions).select(retrieval)
    return retrieve_fused(index, batch, [k] * 5, retrieval)


def hold(conditions: tuple[str, ...], passage: RetrievedPassage) -> bool:
    values = json.loads(passage.passage.metadata or "")
    tests = {
        "year = 2003": values["year"] == 2003,
        "'two' in tags": "two" in values["tags"],
        "year > 2002": values["year"] > 2002,
        "year > 3000": False,
    }
    return all(tests[condition] for condition in conditions)


def test_filtered_search_finds_the_best_of_those_that_are_left(index: Path) -> None:
    retrieval = RetrievalConfig(device="cpu", fusion="rrf", search="nprobe=4")
    opened = PassageIndex.open(place(index), retrieval)
    manifest = read_manifest(place(index))
    assert manifest.metadata == {"year": "integer", "tags": "strings"}
    served = ServedIndex(str(index), manifest.compute_digest(), 3, retrieval, StorageConfig())
    servers = start_servers(served, [None] * 2, ExecutionConfig(cpus_per_server=0))
    for fusion in ("dense", "lexical", "rrf"):
        found = ask(opened, fusion, CONDITIONS, 6)
        assert ask(PartitionedIndex(manifest, servers), fusion, CONDITIONS, 6) == found, fusion
        assert [len(passages) for passages in found][-1] == 0
        if fusion != "rrf":
            everything = ask(opened, fusion, ((),) * 5, ROWS)
            left = [[p for p in every if hold(one, p)] for every, one in zip(everything, CONDITIONS, strict=True)]
            assert [[(p.passage, p.score) for p in some] for some in found] == [
                [(p.passage, p.score) for p in some[:6]] for some in left
            ]
        assert all(hold(one, passage) for passages, one in zip(found, CONDITIONS, strict=True) for passage in passages)


def test_wrong_condition_is_named_by_shard_servers_too(index: Path) -> None:
    manifest = read_manifest(place(index))
    retrieval = RetrievalConfig(device="cpu")
    served = ServedIndex(str(index), manifest.compute_digest(), 3, retrieval, StorageConfig())
    partitioned = PartitionedIndex(manifest, start_servers(served, [None], ExecutionConfig(cpus_per_server=0)))
    batch = QueryBatch(np.zeros((1, 384), np.float32), conditions=[("cast(text as int) = 1",)])
    with pytest.raises(FilterError, match="filter 'cast\\(text as int\\) = 1': Could not convert string"):
        partitioned.rank(batch, [3])


def test_query_finds_the_same_whatever_its_batch(index: Path) -> None:
    opened = PassageIndex.open(place(index), RetrievalConfig(device="cpu", search="nprobe=1"))
    vectors = np.random.default_rng(8).normal(size=(6, 384)).astype(np.float32)
    conditions = [("year > 2003",)] * 3 + [()] * 3
    depths = [3, 50, 7, 3, 50, 7]
    (together,) = opened.rank(QueryBatch(vectors, conditions=conditions), depths)
    for place_of, wanted in enumerate(together):
        one = QueryBatch(vectors, conditions=conditions).take([place_of])
        assert opened.rank(one, [depths[place_of]]) == [[wanted]]
        assert len(wanted) <= depths[place_of]


def test_filter_of_the_run_that_holds_for_nothing_is_warned_of(index: Path, caplog: pytest.LogCaptureFixture) -> None:
    for condition in ("year > 3000", "year > 2000"):
        PassageIndex.open(place(index), RetrievalConfig(device="cpu", filter=condition))
    warned = [record.getMessage() for record in caplog.records if record.name == "pipeline.retrieval.index"]
    assert warned == ["retrieval.filter 'year > 3000' holds for no passage of 3 shards"]


async def test_conditions_of_the_run_and_of_a_row_hold_together(index: Path) -> None:
    retriever = IndexRetriever.open(place(index), RetrievalConfig(device="cpu", fusion="lexical", filter="year = 2003"))
    found = (await retriever.retrieve("gold", 50, "'two' in tags")).passages
    assert {tuple(json.loads(p.passage.metadata or "").values()) for p in found} == set()
    found = (await retriever.retrieve("gold", 50, "'odd' in tags -- only")).passages
    assert len(found) == sum(year == 2003 and n % 4 == 1 for n, year in enumerate(YEARS))
    with pytest.raises(FilterError, match='column "month" not found'):
        await retriever.retrieve("gold", 1, "month = 1")
    with pytest.raises(FilterError, match="syntax error"):
        await retriever.retrieve("gold", 50, "true) or (true")
    assert (await retriever.retrieve("gold", 1)).passages
    retriever.close()


def test_column_that_is_missing_stops_the_build_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    result = run(source, tmp_path / "out", "--embeddings", "vector", "--metadata", "month")
    assert (result.exit_code, result.stderr.count("error:")) == (2, 1)
    assert "no column month (--metadata)" in result.stderr
    assert not (tmp_path / "out").exists()
