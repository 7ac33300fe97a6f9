"""Queries in, and those of them that no earlier set answers."""

from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from pipeline.config import Columns, StorageConfig
from pipeline.incremental import Earlier, NothingNewError, Selection
from pipeline.query_set import inspect_queries
from pipeline.storage import Location, locate


def place(path: Path) -> Location:
    return locate(str(path), StorageConfig())


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    """Ten queries in two files and three row groups."""
    folder = tmp_path / "queries"
    folder.mkdir()
    table = pa.table({"id": [f"q{n}" for n in range(10)], "query": ["?"] * 10, "extra": range(10)})
    pq.write_table(table.slice(0, 6), folder / "a.parquet", row_group_size=4)
    pq.write_table(table.slice(6), folder / "b.parquet")
    return folder


def answered(sets: Path, name: str, *ids: str, folder: str = "data") -> None:
    """An earlier set with some answers, or errors."""
    file = sets / name / folder / f"part-{len(list(sets.rglob('part-*'))):020x}.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"id": pa.array(ids, pa.string()), "answer": ["!"] * len(ids)}), file)


def select(asked: Path, sets: Path, anew: bool = False, column: str = "id") -> Selection:
    """What today's run has to do."""
    queries = inspect_queries(place(asked), Columns(id=column), unit_rows=3)
    selection = Selection.of(place(sets / "today"))
    if selection.made() and not anew:
        selection.check(queries)
    else:
        selection.make(queries, Earlier(place(sets), place(sets / "today"), column), StorageConfig())
    return selection


def rows(selection: Selection) -> list[tuple[str, int]]:
    table = ds.dataset(selection.folder.path, format="parquet", exclude_invalid_files=True).to_table()
    return list(zip(table["id"].to_pylist(), table["extra"].to_pylist(), strict=True))


def test_answered_ids_are_left_out_and_failed_ones_are_not(asked: Path, tmp_path: Path):
    answered(tmp_path / "sets", "monday", "q0", "q7", "other")
    answered(tmp_path / "sets", "monday", "q1", folder="errors")
    answered(tmp_path / "sets", "week/tuesday", "q3", "q4", "q5")
    found = select(asked, tmp_path / "sets")
    assert rows(found) == [("q1", 1), ("q2", 2), ("q6", 6), ("q8", 8), ("q9", 9)]


def test_a_set_can_itself_be_the_folder(asked: Path, tmp_path: Path):
    answered(tmp_path, "set", "q0", "q1", "q2", "q3", "q4", "q5", "q6", "q7")
    answered(tmp_path, "set", "q8", folder="errors")
    assert [row for row, _ in rows(select(asked, tmp_path / "set"))] == ["q8", "q9"]


def test_the_first_run_has_all_queries(asked: Path, tmp_path: Path):
    found = select(asked, tmp_path / "sets")
    assert [row for row, _ in rows(found)] == [f"q{n}" for n in range(10)]


def test_a_selection_stays_what_it_was(asked: Path, tmp_path: Path):
    answered(tmp_path / "sets", "monday", "q0")
    first = select(asked, tmp_path / "sets")
    answered(tmp_path / "sets", "today", "q1", "q2")  # what the run has done before it was killed
    answered(tmp_path / "sets", "other", "q9")
    again = select(asked, tmp_path / "sets")
    assert rows(again) == rows(first)
    anew = select(asked, tmp_path / "sets", anew=True)
    assert [row for row, _ in rows(anew)] == [f"q{n}" for n in range(1, 9)]


def test_a_selection_that_was_not_finished_is_made_again(asked: Path, tmp_path: Path):
    left = tmp_path / "sets" / "today" / "_queries"
    left.mkdir(parents=True)
    pq.write_table(pa.table({"id": ["x"], "query": ["?"], "extra": [1]}), left / "part-00007.parquet")
    assert len(rows(select(asked, tmp_path / "sets"))) == 10
    assert not (left / "part-00007.parquet").exists()


def test_other_queries_than_those_selected_from_are_refused(asked: Path, tmp_path: Path):
    select(asked, tmp_path / "sets")
    pq.write_table(pa.table({"id": ["new"], "query": ["?"], "extra": [1]}), asked / "c.parquet")
    with pytest.raises(ValueError, match="today/_queries was chosen from other queries; choose another output"):
        select(asked, tmp_path / "sets")


def test_nothing_new_is_said_every_time(asked: Path, tmp_path: Path):
    answered(tmp_path / "sets", "monday", *(f"q{n}" for n in range(10)))
    for _ in range(2):
        with pytest.raises(NothingNewError, match="all 10 queries are answered below .*sets; nothing is left to do"):
            select(asked, tmp_path / "sets")
    assert not (tmp_path / "sets" / "today").exists()


def test_many_rows_go_into_several_files(asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pipeline.incremental.FILE_ROWS", 4)
    found = select(asked, tmp_path / "sets")
    files = sorted(Path(found.folder.path).glob("part-*.parquet"))
    assert [pq.read_metadata(file).num_rows for file in files] == [4, 5, 1]
    assert [row for row, _ in rows(found)] == [f"q{n}" for n in range(10)]


def test_a_set_without_the_column_of_ids_is_named(asked: Path, tmp_path: Path):
    answered(tmp_path / "sets", "monday", "q0")
    table = pa.table({"key": ["a"], "query": ["?"]})
    pq.write_table(table, tmp_path / "other.parquet")
    with pytest.raises(ValueError, match=r"monday/data/part-0+\.parquet: no column 'key' of ids \(columns.id\)"):
        select(tmp_path / "other.parquet", tmp_path / "sets", column="key")
