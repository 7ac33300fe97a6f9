"""Indexes with a lexical part: the same passages from any number of shards and servers."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.sections import ExecutionConfig, RetrievalConfig, StorageConfig
from pipeline.decoding.types import RetrievedPassage
from pipeline.retrieval.fusion import QueryBatch, SearchableIndex, retrieve_fused
from pipeline.retrieval.index import PassageIndex
from pipeline.retrieval.manifest import check_index_manifest, read_manifest
from pipeline.retrieval.retriever import IndexRetriever
from pipeline.retrieval.shard_servers import PartitionedIndex, ServedIndex, start_servers
from pipeline.retrieval.words import WordForm
from tests.support.building import given_vectors, run
from tests.support.indexes import place

pytestmark = pytest.mark.usefixtures("lasting_ray")

TOPICS = ("iron", "gold", "sea", "wind", "iron gold", "sea sea wind")
FUSED = RetrievalConfig(device="cpu", fusion="rrf")
OPTIONS = ("--embeddings", "vector", "--lexical", "--stemmer", "english")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ninety passages; each has its number and a topic in its text."""
    table, _ = given_vectors(90)
    texts = [f"Passage {n} about {TOPICS[n % len(TOPICS)]}{'s' * (n % 2)}." for n in range(90)]
    file = tmp_path_factory.mktemp("passages") / "passages.parquet"
    pq.write_table(table.set_column(2, "text", pa.array(texts)), file)
    return file


def build(source: Path, folder: Path, shards: int) -> Path:
    result = run(source, folder, *OPTIONS, "--shards", str(shards))
    assert result.exit_code == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def many(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of three shards."""
    return build(source, tmp_path_factory.mktemp("many") / "index", 3)


def ask(index: SearchableIndex, fusion: str) -> list[list[RetrievedPassage]]:
    words = [["iron"], ["gold", "17"], ["sea", "wind"], ["nothing"]]
    vectors = np.random.default_rng(7).normal(size=(4, 384)).astype(np.float32)
    retrieval = FUSED.model_copy(update={"fusion": fusion})
    return retrieve_fused(index, QueryBatch(vectors, words).select(retrieval), [8] * 4, retrieval)


def test_shards_and_servers_find_what_one_index_finds(source: Path, many: Path, tmp_path: Path) -> None:
    one = build(source, tmp_path / "one", 1)
    manifest = read_manifest(place(many))
    assert manifest.lexical == WordForm(stemmer="english")
    files = {entry.lexical.file for entry in manifest.shards if entry.lexical}
    assert files == {f"shard-{n:05d}.lexical.arrow" for n in range(3)}
    assert sum(entry.lexical.words for entry in manifest.shards if entry.lexical) == sum(
        len(row["title"].split()) + len(row["text"].split()) for row in pq.read_table(source).to_pylist()
    )
    assert not (many / "_build").exists()
    alone, sharded = (PassageIndex.open(place(folder), FUSED) for folder in (one, many))
    served = ServedIndex(str(many), manifest.compute_digest(), 3, FUSED, StorageConfig())
    servers = start_servers(served, [None] * 2, ExecutionConfig(cpus_per_server=0))
    for fusion in ("dense", "lexical", "rrf"):
        wanted = ask(alone, fusion)
        assert ask(sharded, fusion) == wanted, fusion
        assert ask(PartitionedIndex(manifest, servers), fusion) == wanted, fusion
    lexical = ask(alone, "lexical")
    assert {passage.passage.text.split("about ")[1].rstrip("s.") for passage in lexical[0]} == {"iron"}
    assert lexical[1][0].passage.id == "17"
    assert lexical[3] == []


def test_dense_search_neither_needs_nor_opens_the_lexical_part(many: Path, tmp_path: Path) -> None:
    folder = tmp_path / "index"
    shutil.copytree(many, folder)
    (folder / "shard-00001.lexical.arrow").write_bytes(b"damaged")
    dense = PassageIndex.open(place(folder), RetrievalConfig(device="cpu"))
    assert dense.shards[1].lexical is None
    with pytest.raises(ValueError, match=r"shard-00001\.lexical\.arrow: .*bytes, but index\.json records"):
        PassageIndex.open(place(folder), FUSED)


async def test_search_by_words_alone_loads_no_encoder(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "index"
    shutil.copytree(many, folder)
    monkeypatch.delattr("pipeline.retrieval.retriever.Encoder.load")
    for file in folder.glob("*.faiss"):
        file.write_bytes(bytes(file.stat().st_size))
    retriever = IndexRetriever.open(place(folder), RetrievalConfig(device="cpu", fusion="lexical"))
    (best,) = (await retriever.retrieve("Which passages are about GOLD? 55", 1)).passages
    assert best.passage.id == "55"
    retriever.close()


@pytest.mark.slow
def test_interrupted_build_scores_only_the_missing_shards(
    source: Path, many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read_manifest(place(many))

    def killed(*_: object) -> None:
        raise OSError("the machine is gone")

    with monkeypatch.context() as patched:
        patched.setattr("pipeline.indexing.build_pool.write_manifest", killed)
        assert run(source, tmp_path / "out", *OPTIONS, "--shards", "3").exit_code == 1
    (tmp_path / "out" / "shard-00001.lexical.arrow").unlink()
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("shard-*")}
    build(source, tmp_path / "out", 3)
    assert read_manifest(place(tmp_path / "out")).shards == whole.shards
    after = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("shard-*")}
    assert len(before) == 8
    assert {name for name in after if after[name] == before.get(name)} == set(before)


def test_index_without_a_lexical_part_is_refused_for_lexical_search(saved, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"has no lexical part, which retrieval\.fusion=rrf needs; build it with --lex"
    ):
        check_index_manifest(saved, FUSED)


def test_options_of_words_need_a_lexical_part(source: Path, tmp_path: Path) -> None:
    result = run(source, tmp_path / "out", "--stemmer", "english")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "--stemmer and --stop-words need --lexical" in result.stderr
    result = run(source, tmp_path / "out", "--lexical", "--stemmer", "klingon")
    assert result.exit_code == 2
    assert "unknown language 'klingon'; expected one of arabic" in result.stderr
