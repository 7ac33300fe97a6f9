import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.sections import StorageConfig
from pipeline.storage import parquet
from pipeline.storage.location import StorageError, locate
from pipeline.storage.parquet import (
    GroupReader,
    RowRange,
    encode_parquet,
    is_parquet,
    list_parquet,
    map_in_threads,
    open_pages,
    read_batches,
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


@pytest.fixture(scope="module")
def large_group(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of one row group with 48 MB that cannot be compressed, in pages of about a megabyte."""
    file = tmp_path_factory.mktemp("large") / "a.parquet"
    table = pa.table({"id": [str(n) for n in range(480)], "text": [os.urandom(50_000).hex() for _ in range(480)]})
    with pq.ParquetWriter(file, table.schema, write_batch_size=8, compression="none") as writer:
        writer.write_table(table)
    assert pq.read_metadata(file).num_row_groups == 1
    return file


@pytest.fixture
def pool() -> Iterator[pa.MemoryPool]:
    """The default memory pool, counted from here on."""
    before = pa.default_memory_pool()
    counted = pa.proxy_memory_pool(before)
    pa.set_memory_pool(counted)
    yield counted
    pa.set_memory_pool(before)


def read_ranges(reader: GroupReader) -> int:
    return sum(reader.read(start, 10).num_rows for start in range(0, 480, 10))


@pytest.mark.parametrize(
    "read",
    [
        lambda file: read_ranges(GroupReader(pa.OSFile(str(file)), 0)),
        lambda file: sum(batch.num_rows for batch in read_batches(open_pages(pa.OSFile(str(file))))),
        lambda file: sum(b.num_rows for _, b in read_range(RowRange(place(file), 0, 480), ["id", "text"], 16)),
    ],
    ids=["ranges", "all batches", "range of the file"],
)
def test_a_large_row_group_is_not_read_as_a_whole(
    large_group: Path, pool: pa.MemoryPool, read: Callable[[Path], int]
) -> None:
    assert read(large_group) == 480
    assert pool.max_memory() < 24e6


@pytest.mark.parametrize("rows", [1, 2, 7, 100])
@pytest.mark.parametrize("group", [1, 3, 50])
def test_batches_hold_every_row_whatever_the_row_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, group: int
) -> None:
    monkeypatch.setattr(parquet, "BATCH_BYTES", 100)
    file = write(tmp_path / "a.parquet", rows, group)
    batches = list(read_batches(open_pages(pa.OSFile(str(file)))))
    assert [name for batch in batches for name in batch["id"].to_pylist()] == [str(n) for n in range(rows)]


def test_a_file_without_rows_has_no_batches(tmp_path: Path) -> None:
    assert list(read_batches(open_pages(pa.OSFile(str(write(tmp_path / "a.parquet", 0)))))) == []


PAGES = pa.table({"id": [f"{n:04}" for n in range(400)], "text": [f"text {n:08}" for n in range(400)]})


def flip(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize("share", [0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
def test_a_changed_bit_in_a_written_file_is_noticed(tmp_path: Path, share: float) -> None:
    content = encode_parquet(PAGES)
    footer = int.from_bytes(content[-8:-4], "little") + 8
    (tmp_path / "a.parquet").write_bytes(flip(content, int((len(content) - footer) * share)))
    with pytest.raises(StorageError, match=r"a\.parquet: .*; delete it and run again"):
        read_columns(place(tmp_path / "a.parquet"), ["id", "text"])


def test_a_changed_bit_would_be_read_without_checksums(tmp_path: Path) -> None:
    pq.write_table(PAGES, tmp_path / "a.parquet", compression="none", use_dictionary=False)
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content.replace(b"text 00000007", b"text 00000009"))
    assert read_columns(place(tmp_path / "a.parquet"), ["text"])["text"][7].as_py() == "text 00000009"
    pq.write_table(PAGES, tmp_path / "a.parquet", compression="none", use_dictionary=False, write_page_checksum=True)
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content.replace(b"text 00000007", b"text 00000009"))
    with pytest.raises(StorageError, match=r"a\.parquet: .*CRC.*; delete it and run again"):
        read_columns(place(tmp_path / "a.parquet"), ["text"])
