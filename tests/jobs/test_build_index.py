from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import typer
from typer.testing import CliRunner, Result

from jobs.build_index import BuildPlan, BuildRequest, build_index, check, clear, encode_passages, prepare_index
from pipeline.config import RetrievalConfig, StorageConfig
from pipeline.encoder import Encoder, Vectors
from pipeline.index import PassageIndex, check_encoder, check_index
from pipeline.passages import find_passages, plan_shards, read_passages, sample_passages
from pipeline.retrieve import IndexRetriever
from pipeline.storage import locate
from pipeline.types import Passage

DEMO = Path(__file__).parents[2] / "infra" / "demo" / "passages.parquet"
app = typer.Typer()
app.command()(build_index)


def run(passages: Path, output: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["--passages", str(passages), "--output", str(output), *options])


def place(path: Path) -> Any:
    return locate(str(path), StorageConfig())


def numbered(rows: int, start: int = 0) -> dict[str, list[Any]]:
    names = [str(row) for row in range(start, start + rows)]
    return {"id": names, "title": [f"title {n}" for n in names], "text": [f"text {n}" for n in names]}


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


def test_built_shards_rank_as_one_index_over_all_passages(built: tuple[pa.Table, Path]) -> None:
    passages, folder = built
    encoder = Encoder.load("demo", "cpu")
    vectors = encode_passages(encoder, passages, 32)
    exact = faiss.IndexFlatIP(encoder.dimension)
    exact.add(vectors)
    scores, rows = exact.search(vectors[:10], 5)
    found = PassageIndex.open(place(folder), RetrievalConfig(device="cpu", search="nprobe=4")).retrieve(vectors[:10], 5)
    ids = passages["id"].to_pylist()
    assert [[hit.passage.id for hit in hits] for hits in found] == [[ids[row] for row in best] for best in rows]
    np.testing.assert_allclose([[hit.score for hit in hits] for hits in found], scores, atol=1e-5)


def test_built_shards_share_their_training(built: tuple[pa.Table, Path]) -> None:
    _, folder = built
    lists = []
    for file in sorted(folder.glob("*.faiss")):
        index = faiss.read_index(str(file))
        lists.append(index.quantizer.reconstruct_n(0, 4))
    assert len(lists) == 3
    np.testing.assert_array_equal(lists[0], lists[1])
    np.testing.assert_array_equal(lists[0], lists[2])


def test_manifest_says_what_was_built(built: tuple[pa.Table, Path]) -> None:
    _, folder = built
    manifest = check_index(place(folder), RetrievalConfig(encoder="demo"))
    assert (manifest.encoder.name, manifest.dimension, manifest.factory) == ("demo", 384, "IVF4,Flat")
    assert [shard.rows for shard in manifest.shards] == [20, 20, 20]
    check_encoder(Encoder.load("demo", "cpu"), manifest)
    files = {"index.json", *(name for shard in manifest.shards for name, _, _ in shard.files())}
    assert {file.name for file in folder.iterdir()} == files


async def test_retriever_finds_the_passage_that_answers(built: tuple[pa.Table, Path]) -> None:
    passages, folder = built
    row = passages.slice(7, 1).to_pylist()[0]
    retriever = IndexRetriever.open(place(folder), RetrievalConfig(device="cpu", search="nprobe=4"))
    best, *rest = await retriever.retrieve(row["text"][:200], 3)
    assert best.passage == Passage(row["id"], row["title"], row["text"])
    assert best.rank == 1
    assert best.score is not None
    assert all(best.score >= other.score for other in rest if other.score is not None)
    retriever.close()


def test_existing_index_is_not_replaced_unasked(built: tuple[pa.Table, Path]) -> None:
    _, folder = built
    before = (folder / "index.json").read_bytes()
    result = run(DEMO, folder)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "already holds an index; say --overwrite" in result.stderr
    assert (folder / "index.json").read_bytes() == before


def refused(result: Result, *parts: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ")
    assert result.stdout == ""
    for part in parts:
        assert part in result.stderr


def test_missing_passages_are_named(tmp_path: Path) -> None:
    refused(run(tmp_path / "none", tmp_path / "out"), f"{tmp_path}/none: no such file or folder")


def test_folder_without_parquet_is_named(tmp_path: Path) -> None:
    refused(run(tmp_path, tmp_path / "out"), f"{tmp_path}: no Parquet files")


def test_unknown_scheme_is_named(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["--passages", "gopher://x/y", "--output", str(tmp_path / "out")])
    refused(result, "gopher://x/y")


def test_file_that_is_not_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"id,title,text\n")
    refused(run(tmp_path, tmp_path / "out"), "a.parquet: cannot be read as Parquet")


def test_truncated_parquet_is_named(source: Path, tmp_path: Path) -> None:
    content = (source / "b.parquet").read_bytes()
    (source / "b.parquet").write_bytes(content[: len(content) // 2])
    refused(run(source, tmp_path / "out"), "b.parquet: cannot be read as Parquet")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"title": None}, "c.parquet: column title is missing"),
        ({"id": [1, 2, 3]}, "c.parquet: column id is int64; make it string"),
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


class LetterEncoder:
    """Two dimensions, from the last character of a text."""

    name, revision, digest, dimension = "letters", None, "d" * 64, 2

    def encode(self, texts: list[str], batch_size: int) -> Vectors:
        angles = [float(ord(text[-1])) for text in texts]
        return np.array([[np.cos(angle), np.sin(angle)] for angle in angles], np.float32)


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.build_index.Encoder.load", lambda name: LetterEncoder())


@pytest.mark.parametrize(
    ("factory", "problem"),
    [
        ("Flatt", "factory Flatt: could not parse index string Flatt"),
        ("PQ7", "factory PQ7: The dimension of the vector (d) should be a multiple"),
        ("IVF16,Flat", "factory IVF16,Flat: 16 inverted lists need as many passages, there are 15"),
        ("PQ2", "cannot be trained on 15 passages"),
    ],
)
def test_bad_factory_is_refused(letters: None, source: Path, tmp_path: Path, factory: str, problem: str) -> None:
    result = run(source, tmp_path / "out", "--factory", factory)
    assert result.exit_code == 2
    assert problem in result.stderr.splitlines()[-1]


def planned(letters_source: Path, output: Path, **changes: Any) -> tuple[BuildPlan, Encoder]:
    return check(BuildRequest(str(letters_source), str(output), **changes))


def test_trained_index_is_handed_out_empty(letters: None, source: Path, tmp_path: Path) -> None:
    plan, encoder = planned(source, tmp_path / "out", factory="IVF2,Flat", shards=2)
    index = prepare_index(plan, encoder)
    assert (index.is_trained, index.ntotal, index.nlist) == (True, 0, 2)


def test_failed_build_leaves_no_index(
    letters: None, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(plan: BuildPlan, index: Any) -> None:
        raise ray.exceptions.RayError("a machine is gone")

    monkeypatch.setattr("jobs.build_index.connect", lambda execution: None)
    monkeypatch.setattr("jobs.build_index.build_shards", fail)
    (tmp_path / "index.json").write_text("an earlier index")
    result = run(source, tmp_path, "--overwrite")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "error: a machine is gone"
    assert not (tmp_path / "index.json").exists()


def test_shards_cut_across_files_and_row_groups_without_loss(source: Path) -> None:
    shards = plan_shards(find_passages(place(source)), 4)
    read = [[i for batch in read_passages(shard.ranges) for i in batch["id"].to_pylist()] for shard in shards]
    assert read == [["0", "1", "2"], ["3", "4", "5", "6"], ["7", "8", "9", "10"], ["11", "12", "13", "14"]]
    assert [shard.rows for shard in shards] == [3, 4, 4, 4]


def test_passages_are_read_as_plain_strings(tmp_path: Path) -> None:
    table = pa.table(
        {
            "text": pa.array(["x", "y"], pa.large_string()),
            "id": pa.array(["1", "2"]),
            "title": pa.array(["same", None]).dictionary_encode(),
            "more": [1.0, 2.0],
        }
    )
    pq.write_table(table, tmp_path / "p.parquet")
    (batch,) = read_passages(tuple(find_passages(place(tmp_path / "p.parquet"))))
    assert batch.to_pylist() == [{"id": "1", "title": "same", "text": "x"}, {"id": "2", "title": "", "text": "y"}]


def test_sample_is_spread_evenly(source: Path) -> None:
    files = find_passages(place(source))
    assert sample_passages(files, 3)["id"].to_pylist() == ["0", "7", "14"]
    assert sample_passages(files, 100)["id"].to_pylist() == [str(n) for n in range(15)]


def test_clearing_removes_an_index_and_nothing_else(tmp_path: Path) -> None:
    for name in ("index.json", "shard-00000.faiss", "shard-00000.passages.arrow", "notes.txt"):
        (tmp_path / name).write_text("x")
    clear(place(tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
