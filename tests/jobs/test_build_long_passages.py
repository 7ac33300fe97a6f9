"""Passages that are longer than the encoder reads, and passages in other columns."""

import json
import logging
import shutil
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner

from jobs.check_index import check_index
from pipeline.config.sections import RetrievalConfig
from pipeline.retrieval.index import PassageIndex
from pipeline.retrieval.manifest import read_manifest
from pipeline.retrieval.retriever import IndexRetriever
from tests.support.building import run
from tests.support.indexes import place

pytestmark = pytest.mark.usefixtures("lasting_ray")

checking = typer.Typer()
checking.command()(check_index)

FILLER = "This sentence is about nothing in particular. "
SUBJECTS = ["Otters hold hands while they sleep.", "Basalt is a volcanic rock.", "Violins have four strings."]


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    """Three texts that differ after 700 words only, and a short one; without titles, in other columns."""
    texts = [*(FILLER * 100 + subject for subject in SUBJECTS), "A short text."]
    (tmp_path / "p").mkdir()
    pq.write_table(pa.table({"docid": range(4), "contents": texts}), tmp_path / "p" / "a.parquet")
    return tmp_path / "p"


COLUMNS = ("--column", "id=docid", "--column", "text=contents")


def read_vectors(folder: Path) -> np.ndarray:
    parts = [faiss.read_index(str(file)) for file in sorted(folder.glob("*.faiss"))]
    return np.concatenate([part.reconstruct_n(0, part.ntotal) for part in parts])


@pytest.mark.slow
def test_truncated_passages_are_counted_with_one_warning(
    documents: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = run(documents, tmp_path / "out", *COLUMNS, "--shards", "2")
    assert result.exit_code == 0, result.stderr
    vectors = read_vectors(tmp_path / "out")
    np.testing.assert_array_equal(vectors[0], vectors[1])
    manifest = read_manifest(place(tmp_path / "out"))
    assert [shard.truncated_passages for shard in manifest.shards] == [2, 1]
    assert (manifest.columns, manifest.max_words) == ({"id": "docid", "text": "contents"}, None)
    (warned,) = [line for line in caplog.messages if "longer" in line]
    line = (
        "3 of 4 passages are longer than the encoder reads, and only their beginning is searched; to split them, "
        "build the index with --max-words"
    )
    assert warned == f"{line} (it reads 256 tokens, some 150 English words)"
    checked = CliRunner().invoke(checking, ["--index", str(tmp_path / "out"), "--k", "3"])
    assert line in checked.stdout.splitlines()


@pytest.mark.slow
async def test_split_passages_are_found_by_their_ends(
    documents: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = run(documents, tmp_path / "out", *COLUMNS, "--shards", "2", "--max-words", "150")
    assert result.exit_code == 0, result.stderr
    assert "16 passages, 2 shards" in result.stderr.splitlines()[-1]
    assert not [line for line in caplog.messages if "longer" in line]
    manifest = read_manifest(place(tmp_path / "out"))
    assert (manifest.passages, manifest.max_words, manifest.truncated_passages) == (16, 150, 0)
    assert [shard.rows for shard in manifest.shards] == [10, 6]
    retriever = IndexRetriever.open(place(tmp_path / "out"), RetrievalConfig(device="cpu"))
    best = [(await retriever.retrieve(subject, 1)).passages[0].passage for subject in SUBJECTS]
    assert [passage.id for passage in best] == ["0#5", "1#5", "2#5"]
    assert [passage.text.endswith(subject) for passage, subject in zip(best, SUBJECTS, strict=True)] == [True] * 3
    retriever.close()


@pytest.mark.slow
def test_index_of_split_passages_is_trained_on_their_parts(documents: Path, tmp_path: Path) -> None:
    options = ("--factory", "IVF8,Flat", "--max-words", "30")
    result = run(documents, tmp_path / "out", *COLUMNS, *options)
    assert result.exit_code == 0, result.stderr
    index = PassageIndex.open(place(tmp_path / "out"), RetrievalConfig(device="cpu", search="nprobe=8"))
    assert len(index.shards[0].passages) == 79


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (
            ["--column", "text=nothing"],
            "no column id or nothing, found docid, contents; name another with --column id=COLUMN --col",
        ),
        (["--column", "text"], "--column text: expected NAME=COLUMN, such as text=contents"),
        (["--column", "=contents"], "--column =contents: expected NAME=COLUMN, such as text=contents"),
        (["--column", "body=contents"], "--column body=…: passages have the columns id, title, text"),
        ([*COLUMNS, "--column", "title=head"], "no file has the column head of --column title"),
        (["--embeddings", "v", "--max-words", "9"], "--max-words 9: the vectors of --embeddings v are those of whole"),
        ([], "a.parquet: no column id or text, found docid, contents; name another with --column id=C"),
    ],
)
def test_unusable_options_are_named(documents: Path, tmp_path: Path, options: list[str], problem: str) -> None:
    result = run(documents, tmp_path / "out", *options)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert problem in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--max-words", "40"], "differs in max_words; pass --overwrite"),
        ([], "differs in max_words; pass --overwrite"),
        (["--max-words", "50", "--column", "title=contents"], "differs in columns; pass --overwrite"),
    ],
)
def test_interrupted_build_resumes_only_with_the_same_form(
    documents: Path, tmp_path: Path, options: list[str], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.delattr("pipeline.indexing.build_pool.prepare_index")  # ends the build once it has begun
        assert run(documents, tmp_path / "out", *COLUMNS, "--max-words", "50").exit_code == 1
    result = run(documents, tmp_path / "out", *COLUMNS, *options)
    assert result.exit_code == 2
    assert problem in result.stderr.splitlines()[-1]


@pytest.mark.slow
def test_build_that_an_earlier_version_began_resumes(
    documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = documents / "a.parquet"
    pq.write_table(pq.read_table(plain).rename_columns(["id", "text"]), plain)

    def killed(*_: object) -> None:
        raise OSError("the machine is gone")

    with monkeypatch.context() as patched:
        patched.setattr("pipeline.indexing.build_pool.write_manifest", killed)
        assert run(documents, tmp_path / "out", "--shards", "2").exit_code == 1
    for record in (tmp_path / "out" / "_build").glob("*.json"):
        kept = json.loads(record.read_text())
        for unknown in ("columns", "max_words", "truncated_passages"):
            kept.pop(unknown, None)
        record.write_text(json.dumps(kept))
    with caplog.at_level(logging.INFO, "pipeline.indexing.build_pool"):
        assert run(documents, tmp_path / "out", "--shards", "2").exit_code == 0
    assert "resuming an interrupted build: 2 of 2 shards are done" in caplog.text
    assert read_manifest(place(tmp_path / "out")).truncated_passages is None
    shutil.rmtree(tmp_path / "out")
