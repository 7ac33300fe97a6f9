"""Files are divided into units of at most so many rows, and huge sets into at most so many units."""

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.queries.division import choose_unit_rows, count_units, divide_files
from pipeline.queries.inspection import QueryFile


def inspected(name: str, *groups: int) -> QueryFile:
    return QueryFile(f"{name}.parquet", "v", name, "", pa.schema([]), groups, {})


def describe(files: list[QueryFile], unit_rows: int) -> list[list[tuple[str, int, int, int]]]:
    """File, row group, offset and rows of the parts of each unit."""
    units = divide_files(files, unit_rows)
    return [[(part.digest, part.row_group, part.offset, part.rows) for part in unit.parts] for unit in units]


def test_a_file_is_divided_across_its_row_groups():
    assert describe([inspected("a", 5, 2)], 3) == [[("a", 0, 0, 3)], [("a", 0, 3, 2), ("a", 1, 0, 1)], [("a", 1, 1, 1)]]


def test_small_files_share_units_and_large_ones_do_not():
    files = [inspected("a", 2), inspected("b", 1, 1), inspected("c", 6), inspected("d", 1), inspected("e", 5)]
    assert describe(files, 5) == [
        [("a", 0, 0, 2), ("b", 0, 0, 1), ("b", 1, 0, 1)],
        [("c", 0, 0, 5)],
        [("c", 0, 5, 1)],
        [("d", 0, 0, 1)],
        [("e", 0, 0, 5)],
    ]


def test_empty_row_groups_have_no_part():
    assert describe([inspected("a", 0, 2, 0), inspected("b", 1)], 4) == [[("a", 1, 0, 2), ("b", 0, 0, 1)]]


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=3), max_size=9), st.integers(1, 12))
@settings(max_examples=200)
def test_every_row_is_in_one_unit(sizes: list[list[int]], unit_rows: int):
    files = [inspected(str(number), *groups) for number, groups in enumerate(sizes) if sum(groups)]
    units = list(divide_files(files, unit_rows))
    rows = [
        (part.digest, part.row_group, row)
        for unit in units
        for part in unit.parts
        for row in range(part.offset, part.offset + part.rows)
    ]
    assert rows == [
        (file.digest, group, row) for file in files for group, count in enumerate(file.groups) for row in range(count)
    ]
    assert all(1 <= unit.rows <= unit_rows for unit in units)
    assert len(units) == count_units([file.rows for file in files], unit_rows)


@pytest.mark.parametrize(
    ("files", "unit_rows", "units"),
    [
        ([1], 256, 1),
        ([1_000], 256, 4),
        ([1_024_000], 256, 4_000),
        ([1_024_001], 257, 3_985),  # ⌈1,024,001 / 4,000⌉ = 257
        ([1_000_000] * 10, 2_500, 4_000),
        ([32_768_000], 8_192, 4_000),
        ([100_000_000], 8_192, 12_208),
        ([163_840_000], 8_192, 20_000),
        ([1_000_000] * 1_000, 50_000, 20_000),
    ],
)
def test_units_grow_with_the_set(files: list[int], unit_rows: int, units: int):
    assert (choose_unit_rows(files), count_units(files, choose_unit_rows(files))) == (unit_rows, units)


def test_files_a_little_larger_than_a_unit_do_not_make_too_many():
    files = [50_100, 49_900] * 10_000  # 50,000 rows a unit would be 30,000 units
    assert count_units(files, 50_000) == 30_000
    assert (choose_unit_rows(files), count_units(files, 55_000)) == (55_000, 20_000)
