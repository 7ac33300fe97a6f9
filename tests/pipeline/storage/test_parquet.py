from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.sections import StorageConfig
from pipeline.storage import parquet
from pipeline.storage.location import StorageError, locate
from pipeline.storage.parquet import (
    RowRange,
    encode_parquet,
    is_parquet,
    list_parquet,
    map_in_threads,
    read_columns,
    read_footer,
    read_range,
)
from tests.support.flaky import BUSY, flaky
from tests.support.indexes import place


def write(file: Path, rows: int, row_group_size: int | None = None) -> Path:
    pq.write_table(pa.table({"id": [str(n) for n in range(rows)]}), file, row_group_size=row_group_size)
    return file


def test_missing_bucket_is_distinguished_from_a_missing_folder(s3) -> None:
    storage = StorageConfig(
        endpoint_url=s3.endpoint, access_key=s3.access_key, secret_key=s3.secret_key, region="us-east-1"
    )
    with pytest.raises(ValueError, match=r"^s3://none-such/queries/: not found; its store has no bucket none-such$"):
        list_parquet(locate("s3://none-such/queries/", storage))
    with pytest.raises(ValueError, match=rf"^s3://{s3.bucket}/nothing/: not found$"):
        list_parquet(locate(f"s3://{s3.bucket}/nothing/", storage))


def test_parquet_files_are_listed_by_name(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    for name in ("b.parquet", "a.parquet", "below/c.parquet", "_hidden.parquet"):
        write(tmp_path / name, 1)
    (tmp_path / "a.json").write_text("{}")
    assert [file.name for file in list_parquet(place(tmp_path))] == ["a.parquet", "b.parquet", "c.parquet"]
    assert [file.name for file in list_parquet(place(tmp_path / "a.json"))] == ["a.json"]


def test_parquet_files_are_known_by_suffix_in_any_case_or_by_content(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["a.PARQUET", "b.pq", "c.Parq", "d", "20240101_trino-0"]
    for name in names:
        write(tmp_path / name, 1)
    for name in ("_SUCCESS", ".crc", "_temporary/x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"PAR1")
    for name in ("a.parquet.bak", "a.parquet~", "e.bin"):
        write(tmp_path / name, 1)
    (tmp_path / "empty").touch()
    assert [file.name for file in list_parquet(place(tmp_path))] == sorted(names)
    (record,) = caplog.records
    assert record.message == f"{tmp_path}: 4 files are not read (a.parquet.bak, a.parquet~, e.bin, empty)"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("part-00000-1a2b.c000.snappy.parquet", b"", True),
        ("A.PARQUET", b"", True),
        ("a.Pq", b"", True),
        ("2024.01.01.parq", b"", True),
        ("000000_0", b"PAR1...", True),
        ("20240101_120000_00001_trino", b"PAR1...", True),
        ("delta_1", b"PAR1", True),
        ("encrypted", b"PARE...", False),
        ("orc", b"ORC...", False),
        ("short", b"PAR", False),
        ("empty", b"", False),
        ("a.parquet.gz", b"PAR1", False),
        ("a.parquet.crc", b"PAR1", False),
        ("a.parquet.tmp", b"PAR1", False),
        ("parquet", b"text", False),
        ("a.", b"PAR1", False),
    ],
)
def test_parquet_is_recognized(tmp_path: Path, name: str, content: bytes, expected: bool) -> None:
    (tmp_path / name).write_bytes(content)
    assert is_parquet(place(tmp_path / name)) is expected


def test_damaged_file_with_a_parquet_suffix_is_not_left_out(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", 1)
    (tmp_path / "b.pq").write_bytes(b"")
    assert [file.name for file in list_parquet(place(tmp_path))] == ["a.parquet", "b.pq"]


def test_many_other_files_are_counted_and_some_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "a.parquet", 1)
    for number in range(7):
        (tmp_path / f"{number}.txt").touch()
    list_parquet(place(tmp_path))
    assert "7 files are not read (0.txt, 1.txt, 2.txt, 3.txt, 4.txt, …)" in caplog.text


def test_row_range_can_start_and_stop_within_row_groups(tmp_path: Path) -> None:
    file = place(write(tmp_path / "a.parquet", 20, row_group_size=6))
    read = [(row, batch["id"].to_pylist()) for row, batch in read_range(RowRange(file, 4, 14), ["id"], batch_rows=5)]
    assert [name for _, names in read for name in names] == [str(n) for n in range(4, 14)]
    assert all(names[0] == str(row) for row, names in read)
    assert list(read_range(RowRange(file, 3, 3), ["id"])) == []


def test_reading_resumes_where_the_connection_broke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda _: None)
    write(tmp_path / "p.parquet", 5000, row_group_size=500)
    begun = []
    unbroken = parquet._open_range

    def breaking(part: RowRange, columns: list[str], batch_rows: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        begun.append(part.start)
        for number, read in enumerate(unbroken(part, columns, batch_rows)):
            if number == 3:
                raise OSError(BUSY)
            yield read

    monkeypatch.setattr(parquet, "_open_range", breaking)
    folder, _ = flaky(tmp_path, [])
    part = RowRange(folder / "p.parquet", 700, 4800)
    read = list(read_range(part, ["id"], 400))
    assert [row for row, _ in read][:2] == [700, 900]
    assert [name for _, batch in read for name in batch["id"].to_pylist()] == [str(n) for n in range(700, 4800)]
    assert begun[0] == 700
    assert len(begun) >= 4


def test_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"id,query\n")
    for read in (read_footer, lambda file: list(read_range(RowRange(file, 0, 1), ["id"]))):
        with pytest.raises(ValueError, match=r"a\.parquet: not a readable Parquet file: "):
            read(place(tmp_path / "a.parquet"))
    with pytest.raises(StorageError, match=r"a\.parquet: .*; delete it and run again"):
        read_columns(place(tmp_path / "a.parquet"), ["id"])


def test_damaged_page_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", 2000)
    content = bytearray(file.read_bytes())
    content[4:400] = b"\xff" * 396
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.parquet: not a readable Parquet file: "):
        list(read_range(RowRange(place(file), 0, 2000), ["id"]))


def test_missing_columns_are_omitted(tmp_path: Path) -> None:
    table = pa.table({"usage": [{"seconds": 1.5, "retrievals": 2}], "answer": ["x"]}).replace_schema_metadata(
        {"a": "b"}
    )
    (tmp_path / "a.parquet").write_bytes(encode_parquet(table.replace_schema_metadata({"a": "b"})))
    read = read_columns(place(tmp_path / "a.parquet"), ["usage.seconds", "none"])
    assert read.to_pylist() == [{"usage": {"seconds": 1.5}}]
    assert read.schema.metadata[b"a"] == b"b"


def test_map_in_threads_keeps_the_order_of_items() -> None:
    assert map_in_threads(lambda n: n * n, range(100)) == [n * n for n in range(100)]
