"""Queries in, and those of them that no earlier set answers."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from pipeline.config.sections import NO_SAMPLE, Columns, SampleConfig, StorageConfig
from pipeline.queries.query_set import inspect_queries
from pipeline.queries.selection import Earlier, NothingNewError, Selection, _find_finished
from pipeline.storage.location import Location, StorageError, locate


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


def earlier(sets: Path, name: str, *ids: str, error: str | None = None) -> None:
    """An earlier set with some answers, or with rows that failed."""
    folder = sets / name / ("errors" if error else "data")
    folder.mkdir(parents=True, exist_ok=True)
    columns = {"id": pa.array(ids, pa.string()), "error_type" if error else "answer": [error or "!"] * len(ids)}
    pq.write_table(pa.table(columns), folder / f"part-{len(list(sets.rglob('part-*'))):020x}.parquet")


def select(
    asked: Path, sets: Path, anew: bool = False, column: str = "id", sample: SampleConfig = NO_SAMPLE
) -> Selection:
    """What today's run has to do."""
    output = place(sets / "today")
    if not anew and (kept := Selection.load(output, str(asked), sample)) is not None:
        return kept
    queries = inspect_queries(place(asked), Columns(id=column), unit_rows=3)
    scratch = sets.parent / f"scratch-{len(list(sets.parent.iterdir()))}"
    sources = Earlier(place(sets), output, column)
    return Selection.choose(queries, sources, StorageConfig(), place(scratch), sample).keep(output, str(asked))


def rows(selection: Selection) -> list[tuple[str, int]]:
    table = ds.dataset(selection.folder.path, format="parquet", exclude_invalid_files=True).to_table()
    return list(zip(table["id"].to_pylist(), table["extra"].to_pylist(), strict=True))


def test_answered_rows_are_skipped_and_failed_ones_are_retried(asked: Path, tmp_path: Path):
    earlier(tmp_path / "sets", "monday", "q0", "q7", "other")
    earlier(tmp_path / "sets", "monday", "q1", error="TimeoutError")
    earlier(tmp_path / "sets", "week/tuesday", "q3", "q4", "q5")
    found = select(asked, tmp_path / "sets")
    assert rows(found) == [("q1", 1), ("q2", 2), ("q6", 6), ("q8", 8), ("q9", 9)]


def test_permanently_failed_rows_are_skipped(asked: Path, tmp_path: Path):
    earlier(tmp_path / "sets", "monday", "q0", "q1", error="ValueError")
    earlier(tmp_path / "sets", "monday", "q2", "q3", error="ProcessDiedError")
    earlier(tmp_path / "sets", "tuesday", "q3", error="TimeoutError")
    found = select(asked, tmp_path / "sets")
    assert [row for row, _ in rows(found)] == ["q2", *(f"q{n}" for n in range(4, 10))]
    assert found.known == 3


def test_annotated_set_can_be_given_directly(asked: Path, tmp_path: Path):
    earlier(tmp_path, "set", "q0", "q1", "q2", "q3", "q4", "q5", "q6", "q7")
    earlier(tmp_path, "set", "q8", error="TimeoutError")
    assert [row for row, _ in rows(select(asked, tmp_path / "set"))] == ["q8", "q9"]


def test_first_run_has_all_queries(asked: Path, tmp_path: Path):
    found = select(asked, tmp_path / "sets")
    assert [row for row, _ in rows(found)] == [f"q{n}" for n in range(10)]


def test_selection_is_kept_until_it_is_replaced(asked: Path, tmp_path: Path):
    earlier(tmp_path / "sets", "monday", "q0")
    first = select(asked, tmp_path / "sets")
    earlier(tmp_path / "sets", "today", "q1", "q2")  # what the run has done before it was killed
    earlier(tmp_path / "sets", "other", "q9")
    pq.write_table(pa.table({"id": ["new"], "query": ["?"], "extra": [10]}), asked / "c.parquet")
    again = select(asked, tmp_path / "sets")
    assert (rows(again), again.known) == (rows(first), 1)
    anew = select(asked, tmp_path / "sets", anew=True)
    assert [row for row, _ in rows(anew)] == [*(f"q{n}" for n in range(1, 9)), "new"]


def test_unfinished_selection_is_replaced(asked: Path, tmp_path: Path):
    left = tmp_path / "sets" / "today" / "_queries"
    left.mkdir(parents=True)
    pq.write_table(pa.table({"id": ["x"], "query": ["?"], "extra": [1]}), left / "part-00007.parquet")
    assert len(rows(select(asked, tmp_path / "sets"))) == 10
    assert not (left / "part-00007.parquet").exists()


def test_different_query_set_is_refused_for_a_selection(asked: Path, tmp_path: Path):
    select(asked, tmp_path / "sets")
    with pytest.raises(ValueError, match="today/_queries was selected from .*queries; choose another output"):
        select(tmp_path / "elsewhere", tmp_path / "sets")


def test_damaged_file_of_an_earlier_set_is_named(asked: Path, tmp_path: Path):
    earlier(tmp_path / "sets", "monday", "q0")
    (file,) = (tmp_path / "sets").rglob("part-*")
    file.write_bytes(b"half")
    with pytest.raises(StorageError, match=str(file)):
        select(asked, tmp_path / "sets")


def test_selection_without_new_rows_is_an_error_every_time(asked: Path, tmp_path: Path):
    earlier(tmp_path / "sets", "monday", *(f"q{n}" for n in range(10)))
    for _ in range(2):
        with pytest.raises(
            NothingNewError, match="all 10 queries are already answered or failed below .*sets; nothing is left to do"
        ):
            select(asked, tmp_path / "sets")
    assert not (tmp_path / "sets" / "today").exists()


def test_selection_is_split_into_several_files(asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pipeline.queries.selection.FILE_ROWS", 4)
    monkeypatch.setattr("pipeline.queries.selection.GROUP_ROWS", 3)
    found = select(asked, tmp_path / "sets")
    files = sorted(Path(found.folder.path).glob("part-*.parquet"))
    assert [pq.read_metadata(file).num_rows for file in files] == [6, 4]
    assert max(pq.read_metadata(file).num_row_groups for file in files) == 2
    assert [row for row, _ in rows(found)] == [f"q{n}" for n in range(10)]


def test_set_without_the_id_column_is_named(asked: Path, tmp_path: Path):
    earlier(tmp_path / "sets", "monday", "q0")
    table = pa.table({"key": ["a"], "query": ["?"]})
    pq.write_table(table, tmp_path / "other.parquet")
    with pytest.raises(ValueError, match=r"monday/data/part-0+\.parquet: no id column 'key' \(columns.id\)"):
        select(tmp_path / "other.parquet", tmp_path / "sets", column="key")


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "{}", '{"queries": 1, "known": 0}', '{"queries": "q", "known": "x"}', "\0", '"x"'],
)
def test_a_damaged_selection_is_named(asked: Path, tmp_path: Path, content: str):
    select(asked, tmp_path / "sets")
    (tmp_path / "sets" / "today" / "_queries" / "_selection.json").write_text(content)
    with pytest.raises(ValueError, match=r"_queries/_selection\.json: .*; choose another output"):
        Selection.load(place(tmp_path / "sets" / "today"), str(asked), NO_SAMPLE)


def test_sample_is_drawn_from_the_new_rows_and_kept(asked: Path, tmp_path: Path):
    earlier(tmp_path / "sets", "monday", "q0", "q7")
    found = select(asked, tmp_path / "sets", sample=SampleConfig(rows=4, seed=3))
    drawn = rows(found)
    assert (found.known, found.population, len(drawn)) == (2, 8, 4)
    new = ["q1", "q2", "q3", "q4", "q5", "q6", "q8", "q9"]
    assert [name in new[2 * n : 2 * n + 2] for n, (name, _) in enumerate(drawn)] == [True] * 4
    earlier(tmp_path / "sets", "tuesday", "q1", "q2", "q3")
    assert rows(select(asked, tmp_path / "sets", sample=SampleConfig(rows=4, seed=3))) == drawn


@pytest.mark.parametrize(("sample", "wanted"), [({"rows": 5}, "a sample of 5 rows"), ({}, "all new rows")])
def test_different_sample_is_refused(asked: Path, tmp_path: Path, sample: dict[str, int], wanted: str):
    select(asked, tmp_path / "sets", sample=SampleConfig(rows=4))
    with pytest.raises(ValueError, match=rf"_queries holds a sample of 4 rows \(seed 0\), not {wanted}"):
        select(asked, tmp_path / "sets", sample=SampleConfig.model_validate(sample))


@pytest.mark.parametrize("run_rows", [1, 2, 3, 100])
def test_the_same_rows_are_selected_in_any_number_of_ranges(
    asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_rows: int
):
    monkeypatch.setattr("pipeline.storage.hashes.RUN_ROWS", run_rows)
    earlier(tmp_path / "sets", "monday", "q0", "q7", "other")
    earlier(tmp_path / "sets", "monday", "q1", "q2", error="TimeoutError")
    earlier(tmp_path / "sets", "tuesday", "q2", "q3", error="TimeoutError")
    earlier(tmp_path / "sets", "wednesday", "q9", error="ValueError")
    assert [name for name, _ in rows(select(asked, tmp_path / "sets"))] == ["q1", "q3", "q4", "q5", "q6", "q8"]


def test_ids_that_share_the_first_hash_are_told_apart_by_the_second():
    asked = np.array([[7, 7, 9], [1, 2, 3], [0, 1, 2]], np.uint64)
    tries = np.array([[7, 7, 7, 9], [2, 5, 2, 3], [1, 2, 1, 1]], np.uint64)
    assert _find_finished(asked, tries[:, :1]).tolist() == []
    assert _find_finished(asked, tries[:, [0, 2, 3]]).tolist() == [1]  # 7/2 twice, 9/3 once
    assert _find_finished(asked, tries[:, :0]).tolist() == []
