import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from typer.testing import CliRunner, Result

from pipeline.config.sections import RetrievalConfig
from pipeline.decoding.prompts import format_passage
from pipeline.decoding.types import Passage
from pipeline.indexing.build import BuildRequest, check_build
from pipeline.retrieval.encoder import Encoder
from pipeline.retrieval.index import PassageIndex
from pipeline.retrieval.manifest import check_encoder, check_index_manifest, read_manifest
from pipeline.retrieval.retriever import IndexRetriever
from tests.support.building import app, given_vectors, run
from tests.support.indexes import numbered, place, retrieve

DEMO = Path(__file__).parents[2] / "infra" / "demo" / "passages.parquet"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Ten and five passages in two files, in row groups of four."""
    folder = tmp_path / "passages"
    folder.mkdir()
    pq.write_table(pa.table(numbered(10)), folder / "a.parquet", row_group_size=4)
    pq.write_table(pa.table(numbered(5, 10)), folder / "b.parquet", row_group_size=4)
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[pa.Table, Path]]:
    """Sixty passages of the demo in two files, built into three trained shards over Ray."""
    folder = tmp_path_factory.mktemp("build")
    passages = pq.read_table(DEMO).slice(0, 60)
    (folder / "passages").mkdir()
    pq.write_table(passages.slice(0, 35), folder / "passages" / "a.parquet", row_group_size=10)
    pq.write_table(passages.slice(35), folder / "passages" / "b.parquet")
    was_running = ray.is_initialized()
    result = run(folder / "passages", folder / "index", "--shards", "3", "--factory", "IVF4,Flat")
    assert result.exit_code == 0, result.stderr
    assert f"index: {folder / 'index'}, 60 passages, 3 shards, " in result.stderr.splitlines()[-1]
    yield passages, folder / "index"
    if not was_running:
        ray.shutdown()


def test_built_shards_rank_like_one_index_over_all_passages(built: tuple[pa.Table, Path]) -> None:
    passages, folder = built
    encoder = Encoder.load("demo", "cpu")
    vectors = encoder.encode([format_passage(row["title"], row["text"]) for row in passages.to_pylist()])
    exact = faiss.IndexFlatIP(encoder.dimension)
    exact.add(vectors)
    scores, rows = exact.search(vectors[:10], 5)
    found = retrieve(
        PassageIndex.open(place(folder), RetrievalConfig(device="cpu", search="nprobe=4")), vectors[:10], 5
    )
    ids = passages["id"].to_pylist()
    assert [[hit.passage.id for hit in hits] for hits in found] == [[ids[row] for row in best] for best in rows]
    found_scores = np.asarray([[hit.score for hit in hits] for hits in found], float)
    np.testing.assert_allclose(found_scores, scores, atol=1e-5)


def test_built_shards_share_their_training(built: tuple[pa.Table, Path]) -> None:
    _, folder = built
    lists = []
    for file in sorted(folder.glob("*.faiss")):
        index: Any = faiss.read_index(str(file))
        lists.append(index.quantizer.reconstruct_n(0, 4))
    assert len(lists) == 3
    np.testing.assert_array_equal(lists[0], lists[1])
    np.testing.assert_array_equal(lists[0], lists[2])


def test_manifest_describes_the_built_index(built: tuple[pa.Table, Path]) -> None:
    _, folder = built
    manifest = check_index_manifest(place(folder), RetrievalConfig(encoder="demo"))
    assert (manifest.encoder.name, manifest.dimension, manifest.factory) == ("demo", 384, "IVF4,Flat")
    assert [shard.rows for shard in manifest.shards] == [20, 20, 20]
    check_encoder(Encoder.load("demo", "cpu"), manifest)
    files = {"index.json", *(name for shard in manifest.shards for name, _, _ in shard.list_files())}
    assert {file.name for file in folder.iterdir()} == files


async def test_retriever_finds_the_passage_that_answers(built: tuple[pa.Table, Path]) -> None:
    passages, folder = built
    row = passages.slice(7, 1).to_pylist()[0]
    retriever = IndexRetriever.open(place(folder), RetrievalConfig(device="cpu", search="nprobe=4"))
    best, *rest = (await retriever.retrieve(row["text"][:200], 3)).passages
    assert best.passage == Passage(row["id"], row["title"], row["text"])
    assert best.rank == 1
    assert best.score is not None
    assert all(best.score >= other.score for other in rest if other.score is not None)
    retriever.close()


def test_existing_index_is_not_replaced_without_overwrite(built: tuple[pa.Table, Path]) -> None:
    _, folder = built
    before = (folder / "index.json").read_bytes()
    result = run(DEMO, folder)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "already holds an index; pass --overwrite" in result.stderr
    assert (folder / "index.json").read_bytes() == before


def refused(result: Result, *parts: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ")
    assert result.stdout == ""
    for part in parts:
        assert part in result.stderr


def test_missing_passages_are_named(tmp_path: Path) -> None:
    refused(run(tmp_path / "none", tmp_path / "out"), f"{tmp_path}/none: not found")


def test_folder_without_parquet_is_named(tmp_path: Path) -> None:
    refused(run(tmp_path, tmp_path / "out"), f"{tmp_path}: no Parquet files in it")


def test_unknown_scheme_is_named(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["--passages", "gopher://x/y", "--output", str(tmp_path / "out")])
    refused(result, "gopher://x/y")


def test_file_that_is_not_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"id,title,text\n")
    refused(run(tmp_path, tmp_path / "out"), "a.parquet: not a readable Parquet file")


def test_truncated_parquet_is_named(source: Path, tmp_path: Path) -> None:
    content = (source / "b.parquet").read_bytes()
    (source / "b.parquet").write_bytes(content[: len(content) // 2])
    refused(run(source, tmp_path / "out"), "b.parquet: not a readable Parquet file")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"text": None}, "c.parquet: no column text, found id, title; name another with --column text=COLUMN"),
        ({"id": [1.5, 2.5, 3.5]}, "c.parquet: column id is double; convert it to string"),
        ({"id": ["20", None, "22"]}, "c.parquet: row 1: column id is null"),
        ({"id": ["20", "7", "22"]}, "c.parquet: row 1: column id: '7' is also in "),
        ({"text": ["a", "b", " \n"]}, "c.parquet: row 2: column text is empty"),
        ({"text": ["a", None, "c"]}, "c.parquet: row 1: column text is empty"),
    ],
)
def test_bad_columns_and_rows_are_named(source: Path, tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    columns = {name: values for name, values in (numbered(3, 20) | change).items() if values is not None}
    pq.write_table(pa.table(columns), source / "c.parquet")
    refused(run(source, tmp_path / "out"), problem)
    assert not (tmp_path / "out").exists()


def test_duplicate_id_names_both_places(source: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table(numbered(1, 12)), source / "c.parquet")
    refused(run(source, tmp_path / "out"), "c.parquet: row 0: column id: '12'", "b.parquet: row 2; ids must be unique")


def test_fewer_passages_than_shards_are_refused(source: Path, tmp_path: Path) -> None:
    refused(run(source, tmp_path / "out", "--shards", "16"), "--shards 16: there are only 15 passages")


def test_empty_passages_are_refused(tmp_path: Path) -> None:
    pq.write_table(
        pa.table(numbered(0), schema=pa.schema(dict.fromkeys(numbered(0), pa.string()))), tmp_path / "e.parquet"
    )
    refused(run(tmp_path / "e.parquet", tmp_path / "out"), "no rows")


def test_output_that_is_a_file_is_refused(source: Path) -> None:
    refused(run(source, source / "a.parquet"), "is a file; name a folder")


def test_unknown_encoder_is_refused(source: Path, tmp_path: Path) -> None:
    refused(run(source, tmp_path / "out", "--encoder", "/no/model"), "encoder /no/model: no such folder")


@pytest.mark.parametrize(
    ("factory", "problem"),
    [
        ("Flatt", "factory Flatt: could not parse index string Flatt"),
        ("PQ7", "factory PQ7: The dimension of the vector (d) should be a multiple"),
        ("IVF16,Flat", "factory IVF16,Flat: 16 inverted lists need at least as many passages, but there are 15"),
    ],
)
def test_bad_factory_is_refused(source: Path, tmp_path: Path, factory: str, problem: str) -> None:
    refused(run(source, tmp_path / "out", "--factory", factory), problem)
    assert not (tmp_path / "out").exists()


def test_driver_leaves_the_gpus_to_the_builders(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    devices, load = list[str](), Encoder.load

    def recorded(name: str, device: str = "auto", **options: Any) -> Encoder:
        devices.append(device)
        return load(name, "cpu", **options)

    monkeypatch.setattr(Encoder, "load", recorded)
    plan = check_build(BuildRequest(str(source), str(tmp_path / "out")))
    assert devices == ["cpu"]
    plan.load_vectorizer()
    assert devices == ["cpu", "auto"]


def test_missing_options_are_named() -> None:
    refused(CliRunner().invoke(app, ["--output", "out"]), "--passages is missing")
    refused(CliRunner().invoke(app, ["--passages", "p"]), "--output is missing")


def test_unknown_precision_is_refused(source: Path, tmp_path: Path) -> None:
    refused(run(source, tmp_path / "out", "--dtype", "float8"), "encoder.dtype", "float8")


@pytest.fixture(scope="module")
def cluster(built: tuple[pa.Table, Path]) -> None:
    """Ray stays up from one build to the next."""


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat"])
def test_given_vectors_are_indexed_without_encoding(
    with_vectors: tuple[Path, np.ndarray], tmp_path: Path, factory: str
) -> None:
    source, vectors = with_vectors
    result = run(source, tmp_path / "out", "--embeddings", "vector", "--factory", factory, "--shards", "3")
    assert result.exit_code == 0, result.stderr
    assert read_manifest(place(tmp_path / "out")).embeddings == "vector"
    search = "nprobe=8" if factory.startswith("IVF") else ""
    index = PassageIndex.open(place(tmp_path / "out"), RetrievalConfig(device="cpu", search=search))
    exact = vectors[:20] @ vectors.T
    wanted = [[str(row) for row in np.argsort(-scores)[:5]] for scores in exact]
    assert [[hit.passage.id for hit in hits] for hits in retrieve(index, vectors[:20], 5)] == wanted


@pytest.mark.usefixtures("cluster")
def test_non_finite_vector_fails_the_build_with_its_row(with_vectors: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    source, _ = with_vectors
    table, _ = given_vectors(70, 300)
    vectors = table["vector"].to_pylist()
    vectors[67] = [float("nan")] * 384
    wrong = table.set_column(3, "vector", pa.array(vectors, pa.list_(pa.float32(), 384)))
    pq.write_table(wrong, source / "c.parquet", row_group_size=64)
    result = run(source, tmp_path / "out", "--embeddings", "vector", "--shards", "2")
    assert result.exit_code == 1
    assert f"{source}/c.parquet: row 67: column vector has a non-finite value" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out" / "index.json").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_too_few_training_passages_are_refused(tmp_path: Path) -> None:
    pq.write_table(given_vectors(15)[0], tmp_path / "p.parquet")
    result = run(tmp_path / "p.parquet", tmp_path / "out", "--embeddings", "vector", "--factory", "PQ8")
    assert result.exit_code == 2
    assert "cannot be trained on 15 passages" in result.stderr.splitlines()[-1]


def test_overwrite_keeps_files_outside_the_index(
    built: tuple[pa.Table, Path], with_vectors: tuple[Path, np.ndarray], tmp_path: Path
) -> None:
    source, _ = with_vectors
    shutil.copytree(built[1], tmp_path / "out" / "other")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    before = sorted((tmp_path / "out").rglob("*"))
    refused(run(source, tmp_path / "out", "--overwrite", "--factory", "Flatt"), "factory Flatt")
    assert run(source, tmp_path / "out", "--overwrite", "--embeddings", "vector").exit_code == 0
    assert set(before) < set((tmp_path / "out").rglob("*"))


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_encoding_options_apply_to_passages_and_queries(tmp_path: Path, source: Path) -> None:
    options = ["--query-prefix", "query: ", "--passage-prefix", "passage: ", "--no-normalise"]
    result = run(source, tmp_path / "out", *options)
    assert result.exit_code == 0, result.stderr
    encoder = Encoder.load("demo", "cpu")
    (stored,) = (faiss.read_index(str(file)) for file in (tmp_path / "out").glob("*.faiss"))
    wanted = encoder._model.encode(["passage: title 3\ntext 3"], normalize_embeddings=False)
    np.testing.assert_allclose(stored.reconstruct(3), wanted[0], atol=1e-5)
    retriever = IndexRetriever.open(place(tmp_path / "out"), RetrievalConfig(device="cpu"))
    asked = encoder._model.encode(["query: text 3"], normalize_embeddings=False)
    (found,) = (encoder for encoder in [retriever._encoder] if encoder)
    np.testing.assert_allclose(found.encode_queries(["text 3"]), asked, atol=1e-5)
    retriever.close()
