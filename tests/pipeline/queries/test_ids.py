"""Ids are compared by their hashes, and exactly where two hashes are equal."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.sections import Columns, StorageConfig
from pipeline.queries import ids, inspection
from pipeline.queries.query_set import QuerySet, inspect_queries
from pipeline.storage import hashes
from pipeline.storage.hashes import Hashes
from pipeline.storage.location import locate


@pytest.fixture
def colliding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of the same length have the same hash; runs are short."""

    def measure(texts: pa.ChunkedArray) -> Hashes:
        return np.array([len(text) for text in texts.to_pylist()], np.uint64)

    monkeypatch.setattr(hashes, "RUN_ROWS", 2)
    monkeypatch.setattr(inspection, "hash_texts", measure)
    monkeypatch.setattr(ids, "hash_texts", measure)


def inspect(folder: Path, *files: list[str]) -> QuerySet:
    for number, names in enumerate(files):
        table = pa.table({"id": names, "query": ["?"] * len(names)})
        pq.write_table(table, folder / f"{number}.parquet", row_group_size=max(2, len(names) // 3))
    return inspect_queries(locate(str(folder), StorageConfig()), Columns(), 10)


@pytest.mark.usefixtures("colliding")
def test_different_ids_with_one_hash_are_no_fault(tmp_path: Path):
    assert inspect(tmp_path, ["a", "b", "cc"], ["dd", "e"]).rows == 5


@pytest.mark.usefixtures("colliding")
def test_equal_ids_are_named_with_their_places_among_others_of_their_hash(tmp_path: Path):
    with pytest.raises(ValueError, match=r"^id 'bb' is not unique: .*0\.parquet row 3, .*1\.parquet row 1$"):
        inspect(tmp_path, ["a", "aa", "c", "bb"], ["cc", "bb"])


def test_three_places_of_an_id_are_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"^id 'a' is not unique: .*0.* row 0, .*1.* row 0, .*2\.parquet row 0$"):
        inspect(tmp_path, ["a", "b"], ["a"], ["a"], ["c", "a"])


def test_null_is_named_by_its_row_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pipeline.storage.parquet.MAX_BATCH_ROWS", 2)
    with pytest.raises(ValueError, match=r"0\.parquet: column 'id' is null in row 4; every query needs an id"):
        inspect(tmp_path, ["a", "b", "c", "d", None, "e"])  # type: ignore[list-item]


def test_an_id_from_a_folder_is_refused(tmp_path: Path):
    (tmp_path / "id=q1").mkdir()
    pq.write_table(pa.table({"query": ["a", "b"]}), tmp_path / "id=q1" / "a.parquet")
    with pytest.raises(ValueError, match=r"id=q1/a\.parquet: its folder names the column 'id' \(columns\.id\)"):
        inspect(tmp_path)


def test_a_set_with_every_id_twice_is_refused_at_once(tmp_path: Path):
    names = [f"q{number}" for number in range(200_000)]
    with pytest.raises(ValueError, match=r"^id 'q\d+' is not unique: .*0\.parquet row \d+, .*1\.parquet row \d+$"):
        inspect(tmp_path, names, names)


def test_one_id_in_all_rows_is_named_with_three_of_them(tmp_path: Path):
    with pytest.raises(ValueError, match=r"^id 'a' is not unique: .*0.* row 0, .*0.* row 1, .*0\.parquet row 2$"):
        inspect(tmp_path, ["a"] * 1_000, ["a"] * 1_000)
