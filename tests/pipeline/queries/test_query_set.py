import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.sections import Columns, StorageConfig
from pipeline.queries import inspection, units
from pipeline.queries.query_set import QuerySet, inspect_queries
from pipeline.queries.units import read_unit
from pipeline.storage.location import locate
from pipeline.storage.parquet import open_versioned, read_versioned
from tests.support.flaky import flaky

HERE = StorageConfig()


def write(file, ids, row_group_size=None):
    table = pa.table({"id": pa.array(ids, pa.string()), "query": pa.array([f"q {i}" for i in ids], pa.string())})
    pq.write_table(table, file, row_group_size=row_group_size or max(1, len(ids)))


def inspect(path, unit_rows=4):
    return inspect_queries(locate(str(path), HERE), Columns(), unit_rows)


def read(found: QuerySet) -> pa.Table:
    """All rows, through the units."""
    return pa.concat_tables([read_unit(unit, found.schema, HERE) for unit in found.units])


@given(st.lists(st.integers(0, 23), min_size=1, max_size=3), st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=25)
def test_units_cover_every_row_once(tmp_path_factory, sizes, group, unit_rows):
    folder = tmp_path_factory.mktemp("set")
    for n, size in enumerate([*sizes, 1]):
        write(folder / f"{n}.parquet", [f"{n}-{row}" for row in range(size)], group)
    found = inspect(folder, unit_rows)
    rows = read(found).column("id").to_pylist()
    assert rows == [f"{n}-{row}" for n, size in enumerate([*sizes, 1]) for row in range(size)]
    assert all(1 <= unit.rows <= unit_rows for unit in found.units)
    assert len({unit.id for unit in found.units}) == len(found.units)
    assert found.rows == len(rows)


def test_unit_ids_do_not_depend_on_the_location(tmp_path):
    (tmp_path / "one").mkdir()
    write(tmp_path / "one" / "a.parquet", list("abcdef"))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    one, two = inspect(tmp_path / "one"), inspect(tmp_path / "two")
    assert [u.id for u in one.units] == [u.id for u in two.units]
    assert one.digest == two.digest


def test_digest_depends_on_row_contents(tmp_path):
    for name, middle in (("one", "bbb"), ("two", "bbx")):
        (tmp_path / name).mkdir()
        table = pa.table({"id": ["1", "2", "3"], "query": ["aaa", middle, "ccc"]})  # footers are the same
        pq.write_table(table, tmp_path / name / "a.parquet", compression="none", use_dictionary=False)
    assert inspect(tmp_path / "one").digest != inspect(tmp_path / "two").digest


def test_replaced_file_is_read_again(tmp_path):
    file = tmp_path / "a.parquet"
    for ids in (list("abcd"), list("wxyz"), list("abcdefgh")):
        write(file, ids)
        assert read(inspect(file, 2))["id"].to_pylist() == ids


def test_file_changed_during_the_run_is_named(tmp_path):
    write(tmp_path / "a.parquet", list("abcd"))
    found = inspect(tmp_path / "a.parquet", 2)
    write(tmp_path / "a.parquet", list("abcdefgh"))
    with pytest.raises(ValueError, match=r"a.parquet: has changed since the run began, from \d+ bytes .* to \d+"):
        read(found)


def test_concurrent_units_read_their_row_group_once(tmp_path, monkeypatch):
    write(tmp_path / "a.parquet", list("abcdefgh"))
    found = inspect(tmp_path / "a.parquet", 2)
    reads = []

    def slowly(file):
        reads.append(file.uri)
        time.sleep(0.05)
        return open_versioned(file)

    monkeypatch.setattr(units, "open_versioned", slowly)
    with ThreadPoolExecutor(4) as pool:
        tables = list(pool.map(lambda unit: read_unit(unit, found.schema, HERE), found.units))
    assert [table["id"].to_pylist() for table in tables] == [["a", "b"], ["c", "d"], ["e", "f"], ["g", "h"]]
    assert len(reads) == 1


def test_single_file_is_a_query_set(tmp_path):
    write(tmp_path / "a.parquet", ["x", "y"])
    assert inspect(tmp_path / "a.parquet").files == 1
    assert inspect(tmp_path / "a.parquet").digest == inspect(tmp_path).digest


def test_column_of_nulls_gives_no_passages(tmp_path):
    pq.write_table(pa.table({"id": ["1"], "query": ["x"], "passages": [None]}), tmp_path / "a.parquet")
    assert not inspect(tmp_path).given


def test_small_files_are_read_once_each_and_share_units(tmp_path):
    (tmp_path / "set").mkdir()
    names = [f"set/{n}.parquet" for n in range(10)]
    for n, name in enumerate(names):
        write(tmp_path / name, [f"{n}-{row}" for row in range(3)])
    location, files = flaky(tmp_path, [])
    found = inspect_queries(replace(location, path="set"), Columns(), 8)
    assert sorted(files.opened) == names
    assert [unit.rows for unit in found.units] == [6, 6, 6, 6, 6]
    assert read(inspect(tmp_path, 8))["id"].to_pylist() == [f"{n}-{row}" for n in range(10) for row in range(3)]


def test_row_group_of_several_units_is_read_once_beside_small_files(tmp_path, monkeypatch):
    for n in range(3):
        write(tmp_path / f"{n}a.parquet", [f"{n}-{row}" for row in range(10)])
        write(tmp_path / f"{n}b.parquet", [f"{n}+{row}" for row in range(2)])
    found = inspect(tmp_path, 7)
    assert [[part.rows for part in unit.parts] for unit in found.units] == [[7], [3], [2]] * 3
    reads = []

    def note(file):
        reads.append(file.name)
        return open_versioned(file)

    monkeypatch.setattr(units, "open_versioned", note)
    assert read(found)["id"].to_pylist()[:12] == [*(f"0-{row}" for row in range(10)), "0+0", "0+1"]
    assert sorted(reads) == ["0a.parquet", "0b.parquet", "1a.parquet", "1b.parquet", "2a.parquet", "2b.parquet"]


def test_files_are_read_in_parallel(tmp_path, monkeypatch):
    for n in range(4):
        write(tmp_path / f"{n}.parquet", [str(n)])
    together = Barrier(4, timeout=60)

    def wait(file, *work):
        together.wait()
        return read_versioned(file, *work) if work else open_versioned(file)

    monkeypatch.setattr(inspection, "read_versioned", wait)
    found = inspect(tmp_path)
    monkeypatch.setattr(units, "open_versioned", wait)
    assert read(found)["id"].to_pylist() == list("0123")
