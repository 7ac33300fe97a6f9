"""Files of a query set that are replaced, rewritten or deleted while a run reads them."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.sections import Columns, StorageConfig
from pipeline.queries.ids import number_ids
from pipeline.queries.query_set import QuerySet, inspect_queries
from pipeline.queries.units import read_unit, read_unit_ids
from pipeline.storage.location import MissingFileError, locate
from pipeline.storage.parquet import GroupReader, encode_parquet

HERE = StorageConfig()
BEFORE, AFTER = ["abcd", "efgh"], ["wxyz", "stuv"]


def encode(texts: list[str], row_group_size: int | None = None) -> bytes:
    letters = [letter for text in texts for letter in text]
    return encode_parquet(pa.table({"id": letters, "query": letters}), row_group_size)


def inspect(path: Path, unit_rows: int = 2) -> QuerySet:
    return inspect_queries(locate(str(path), HERE), Columns(), unit_rows)


def read(found: QuerySet) -> list[str]:
    tables = [read_unit(unit, found.schema, HERE) for unit in found.units]
    return pa.concat_tables(tables)["id"].to_pylist()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "set").mkdir()
    path = tmp_path / "set" / "a.parquet"
    path.write_bytes(encode(BEFORE))
    return path


def rewrite(file: Path) -> None:
    file.write_bytes(encode(AFTER))


def rename_over(file: Path) -> None:
    file.with_suffix(".new").write_bytes(encode(AFTER))
    file.with_suffix(".new").rename(file)


def restore_older_copy(file: Path) -> None:
    rewrite(file)
    os.utime(file, (1e9, 1e9))


def divide_into_other_groups(file: Path) -> None:
    file.write_bytes(encode(BEFORE, row_group_size=2))


def grow(file: Path) -> None:
    file.write_bytes(encode([*BEFORE, "ijkl"]))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def damage(file: Path) -> None:
    file.write_bytes(b"\xff" * file.stat().st_size)


def empty(file: Path) -> None:
    file.write_bytes(b"")


def write_text(file: Path) -> None:
    file.write_text('{"id": "a", "query": "a"}\n')


def grow_at_the_same_time(file: Path) -> None:
    before = file.stat()
    grow(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES = [
    rewrite,
    rename_over,
    restore_older_copy,
    divide_into_other_groups,
    grow,
    truncate,
    damage,
    empty,
    write_text,
    grow_at_the_same_time,
]


def test_replacing_files_in_these_tests_keeps_their_size(file: Path) -> None:
    assert len(encode(BEFORE)) == len(encode(AFTER))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("unit_rows", [3, 8], ids=["shared row group", "whole row group"])
def test_a_file_that_changed_before_it_is_read_is_named(
    file: Path, change: Callable[[Path], None], unit_rows: int
) -> None:
    found = inspect(file.parent, unit_rows)
    change(file)
    with pytest.raises(ValueError, match=r"a\.parquet: has changed since the run began.*run the same command again"):
        read(found)


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_between_units_is_named(file: Path, change: Callable[[Path], None]) -> None:
    found = inspect(file.parent)
    assert read_unit(found.units[0], found.schema, HERE)["id"].to_pylist() == ["a", "b"]
    change(file)
    with pytest.raises(ValueError, match=r"a\.parquet: has changed since the run began"):
        read_unit(found.units[1], found.schema, HERE)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("unit_rows", [3, 8], ids=["shared row group", "whole row group"])
def test_a_file_that_changes_while_it_is_read_is_named(
    file: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], unit_rows: int
) -> None:
    found, unchanged = inspect(file.parent, unit_rows), GroupReader.read

    def read_late(reader: GroupReader, offset: int, rows: int) -> pa.Table:
        table = unchanged(reader, offset, rows)
        change(file)
        return table

    monkeypatch.setattr(GroupReader, "read", read_late)
    with pytest.raises(ValueError, match=r"a\.parquet: has changed since the run began"):
        read(found)


def test_a_damaged_file_that_was_not_replaced_is_called_damaged(file: Path) -> None:
    found, before = inspect(file.parent), file.stat()
    damage(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ValueError, match=r"a\.parquet: not a readable Parquet file"):
        read(found)


def test_a_file_that_was_deleted_is_named(file: Path) -> None:
    found = inspect(file.parent)
    file.unlink()
    with pytest.raises(MissingFileError, match=r"a\.parquet"):
        read(found)


def test_ids_of_a_replaced_file_are_not_read(file: Path) -> None:
    found = inspect(file.parent)
    rewrite(file)
    with pytest.raises(ValueError, match=r"a\.parquet: has changed since the run began"):
        read_unit_ids(found.units[0], "id", HERE)
    with pytest.raises(ValueError, match=r"a\.parquet: has changed since the run began"):
        number_ids(found.inspected[0], 0, "id", HERE, lambda _: None)


def test_an_object_that_is_replaced_by_one_of_the_same_size_is_named(s3, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    place = locate(f"s3://{s3.bucket}/changing/a.parquet", HERE)
    place.write(encode(BEFORE))
    found = inspect_queries(place, Columns(), 2)
    assert read(found) == list("abcdefgh")
    found.listing.check_unchanged()
    place.write(encode(AFTER))
    with pytest.raises(ValueError, match=r"a\.parquet: has changed since the run began, from .* with ETag"):
        read(found)


@pytest.mark.parametrize("change", [rewrite, rename_over, restore_older_copy, divide_into_other_groups, grow, truncate])
@pytest.mark.parametrize("whole", [True, False], ids=["folder", "file"])
def test_a_set_that_changed_after_it_was_read_is_named(file: Path, change: Callable[[Path], None], whole: bool) -> None:
    found = inspect(file.parent if whole else file)
    assert read(found) == list("abcdefgh")
    found.listing.check_unchanged()
    change(file)
    with pytest.raises(ValueError, match=r"a\.parquet: has changed since the run began"):
        found.listing.check_unchanged()


def delete_file(file: Path) -> None:
    file.unlink()


def delete_folder(file: Path) -> None:
    shutil.rmtree(file.parent)


def rename(file: Path) -> None:
    file.rename(file.with_name("b.parquet"))


def hide(file: Path) -> None:
    file.rename(file.with_name("_a.parquet"))


@pytest.mark.parametrize("change", [delete_file, delete_folder, rename, hide])
@pytest.mark.parametrize("whole", [True, False], ids=["folder", "file"])
def test_a_file_that_was_deleted_after_it_was_read_is_named(
    file: Path, change: Callable[[Path], None], whole: bool
) -> None:
    found = inspect(file.parent if whole else file)
    change(file)
    with pytest.raises(ValueError, match=r"a\.parquet: was deleted during the run; restore it"):
        found.listing.check_unchanged()


def test_files_that_are_added_during_the_run_do_not_count(file: Path) -> None:
    found = inspect(file.parent)
    (file.parent / "b.parquet").write_bytes(encode(["ijkl"]))
    found.listing.check_unchanged()


def test_a_file_that_is_rewritten_with_the_same_content_gives_the_same_units(file: Path) -> None:
    before = inspect(file.parent)
    os.utime(file, (1e9, 1e9))
    after = inspect(file.parent)
    assert [unit.id for unit in before.units] == [unit.id for unit in after.units]
    assert before.digest == after.digest
    assert read(after) == list("abcdefgh")


def test_dictionaries_and_lists_are_read_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.storage.parquet.BATCH_BYTES", 64)
    rows = 100
    table = pa.table(
        {
            "id": [str(n) for n in range(rows)],
            "query": pa.array([f"q{n % 7}" for n in range(rows)]).dictionary_encode(),
            "choices": [[f"c{n}"] * (n % 4) for n in range(rows)],
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    found = inspect(tmp_path, 7)
    whole = pa.concat_tables([read_unit(unit, found.schema, HERE) for unit in found.units])
    assert whole.to_pylist() == table.to_pylist()
