import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.loading import hash_tree
from pipeline.config.sections import StorageConfig
from pipeline.output.folder import OutputFolder, get_columns, hash_identity
from pipeline.output.unit_files import UnitSummary, Work, split_failed
from pipeline.run.annotation import build_annotated_schema
from pipeline.storage.location import Location, locate

U1 = f"{1:020x}"
RUN = "0123456789ab"
INPUTS = pa.schema([("id", pa.string())])
USAGE = {"prompt_tokens": 10, "generated_tokens": 3}


def test_identity_without_a_reranker_is_that_of_earlier_versions() -> None:
    earlier = {"settings": {"a": 1}, "queries": {"digest": "q"}, "model": {"digest": "m"}, "index": None}
    assert hash_identity({**earlier, "started": "2025"}) == hash_tree(earlier)
    assert hash_identity({**earlier, "reranker": None}) == hash_tree(earlier)
    assert hash_identity({**earlier, "reranker": {"digest": "r"}}) != hash_tree(earlier)


@pytest.fixture
def folder(tmp_path) -> OutputFolder:
    return OutputFolder(locate(str(tmp_path / "out"), StorageConfig()))


def annotated(*ids: str) -> pa.Table:
    """Rows whose id begins with ``bad`` have failed."""
    rows = [
        {"id": i, "error_type": "ValueError", "error_message": "bad", "attempts": 1}
        if i.startswith("bad")
        else {"id": i, "answer": i.upper(), "retrieved": i == "a", "usage": USAGE}
        for i in ids
    ]
    return pa.Table.from_pylist(rows, schema=build_annotated_schema(INPUTS, keep_candidates=False))


def write(folder: OutputFolder, unit: str, *ids: str) -> UnitSummary:
    return folder.write_unit(unit, *split_failed(annotated(*ids), INPUTS, keep_candidates=False), RUN)


def test_rows_are_written_to_data_and_errors(folder, tmp_path):
    summary = write(folder, U1, "a", "bad", "c")
    counted = UnitSummary(U1, 3, {"ValueError": 1}, retrieved=1, generated_tokens=6, prompt_tokens=20, run=RUN)
    assert replace(summary, attempt="", data_bytes=0) == counted
    assert summary.data_bytes == (tmp_path / f"out/data/part-{U1}.parquet").stat().st_size
    assert folder.read_unit(U1, RUN) == replace(summary, data_bytes=0)
    assert pq.read_table(tmp_path / f"out/data/part-{U1}.parquet")["answer"].to_pylist() == ["A", "C"]
    assert pq.read_table(tmp_path / f"out/errors/part-{U1}.parquet").to_pylist() == [
        {"id": "bad", "error_type": "ValueError", "error_message": "bad", "attempts": 1}
    ]


def test_file_metadata_hold_the_times_of_the_unit(folder):
    files = split_failed(annotated("a"), INPUTS, keep_candidates=False)
    summary = folder.write_unit(U1, *files, RUN, Work(12.5, 14.0, 13.0, "a"))
    assert (summary.began, summary.ended) == (12.5, 14.0)
    assert folder.read_unit(U1, RUN) == replace(summary, data_bytes=0)


def test_unit_with_only_errors_has_an_empty_data_file(folder, tmp_path):
    write(folder, U1, "bad")
    assert pq.read_table(tmp_path / f"out/data/part-{U1}.parquet").num_rows == 0
    assert list(folder.list_unit_files("data")) == [U1]


def test_finished_unit_is_not_overwritten(folder, tmp_path):
    first = write(folder, U1, "a", "bad")
    before = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*.parquet")}
    assert write(folder, U1, "a", "b") == replace(first, data_bytes=0)
    assert {file: file.read_bytes() for file in (tmp_path / "out").rglob("*.parquet")} == before


def test_deleted_unit_can_be_written_again(folder):
    write(folder, U1, "a", "bad")
    folder.withdraw(U1)
    assert folder.list_unit_files("data") == {}
    assert write(folder, U1, "a", "b").errors == {}
    summary = folder.read_unit(U1, RUN)
    assert summary is not None
    assert (summary.rows, summary.errors) == (2, {})


def test_kill_during_clear_leaves_a_recognizable_folder(folder, monkeypatch):
    write(folder, U1, "a")
    folder.finish({"a": 1}, [])
    with monkeypatch.context() as patched:
        patched.setattr(Location, "list_files", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            folder.clear()
    assert not folder.is_finished()
    assert folder.find_foreign_file() is None
    folder.clear()
    assert folder.read_manifest() is None


def test_errors_of_an_unfinished_unit_are_ignored(folder, tmp_path):
    write(folder, U1, "a", "bad")
    (tmp_path / f"out/data/part-{U1}.parquet").unlink()  # died between the two files
    assert folder.list_unit_files("data") == {}
    assert folder.read_unit(U1, RUN) is None


def test_manifest_and_success_marker_follow_the_run_status(folder, tmp_path):
    assert folder.read_manifest() is None
    folder.begin({"model": "m"})
    assert folder.read_manifest()["status"] == "running"
    assert not folder.is_finished()
    folder.finish({"model": "m"}, [])
    assert folder.is_finished()
    assert json.loads((tmp_path / "out/_manifest.json").read_text())["status"] == "finished"


def test_foreign_manifest_is_refused(folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/_manifest.json").write_text('{"name": "a browser extension"}')
    with pytest.raises(ValueError, match="_manifest.json: not a manifest of this version"):
        folder.read_manifest()


def test_clear_leaves_other_files(folder, tmp_path):
    folder.begin({})
    write(folder, U1, "a", "bad")
    folder.finish({}, [])
    (tmp_path / "out/notes.txt").write_text("mine")
    (tmp_path / "out/data/train-00000.parquet").write_text("mine")
    folder.clear()
    assert sorted(p.name for p in (tmp_path / "out").rglob("*") if p.is_file()) == ["notes.txt", "train-00000.parquet"]


def test_restarted_run_removes_the_success_marker(folder):
    folder.begin({})
    folder.finish({}, [])
    folder.begin({})
    assert not folder.is_finished()


def test_damaged_unit_is_written_again(folder, tmp_path, caplog):
    write(folder, U1, "a")
    (tmp_path / f"out/data/part-{U1}.parquet").write_bytes(b"PAR1")
    assert folder.read_unit(U1, RUN) is None
    assert f"unit {U1} is annotated again: {folder.location.uri}/data/part-{U1}.parquet: not a readable" in caplog.text
    written = write(folder, U1, "a")
    assert folder.read_unit(U1, RUN) == replace(written, data_bytes=0)


def test_columns_of_a_set_are_named_as_in_its_files():
    columns = get_columns({"configuration": {"columns": {"choices": "Candidates", "query": "answer", "task": "kind"}}})
    assert (columns.choices, columns.query, columns.task) == ("input_Candidates", "input_answer", "kind")
