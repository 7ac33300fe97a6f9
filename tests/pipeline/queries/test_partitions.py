import re
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.sections import Columns, StorageConfig
from pipeline.queries.partitions import NULL, find_partition, infer_types, parse_partition
from pipeline.queries.query_set import QuerySet, inspect_queries
from pipeline.queries.units import read_unit
from pipeline.storage.location import locate

HERE = StorageConfig()


def write(file: Path, ids: list[str], **columns: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"id": ids, "query": [f"q {name}" for name in ids], **columns}), file)


def inspect(folder: Path) -> QuerySet:
    return inspect_queries(locate(str(folder), HERE), Columns(), 4)


def read(found: QuerySet) -> pa.Table:
    return pa.concat_tables([read_unit(unit, found.schema, HERE) for unit in found.units])


@pytest.mark.parametrize(
    ("path", "partition"),
    [
        ("a.parquet", ""),
        ("task=popqa/a.parquet", "task=popqa"),
        ("below/task=popqa/dt=2024-01-01/a.parquet", "task=popqa/dt=2024-01-01"),
        ("task=/a.parquet", "task="),
        ("=x/a.parquet", ""),
        ("x=a=b/a.parquet", "x=a=b"),
        ("task=x.parquet", ""),
    ],
)
def test_partition_is_named_by_the_folders_below_the_root(path: str, partition: str) -> None:
    root = locate("/data/run=7/set/", HERE)
    assert find_partition(root / path, root) == partition


def test_single_file_has_no_partition() -> None:
    file = locate("/data/task=popqa/a.parquet", HERE)
    assert find_partition(file, file) == ""


@pytest.mark.parametrize(
    ("folders", "values"),
    [
        ("", {}),
        ("task=popqa/dt=2024-01-01", {"task": "popqa", "dt": "2024-01-01"}),
        ("at=2024-01-01 10%3A30%3A00", {"at": "2024-01-01 10:30:00"}),
        ("city=K%C3%B6ln", {"city": "Köln"}),
        ("city=Köln", {"city": "Köln"}),
        ("path=a%2Fb%3Dc", {"path": "a/b=c"}),
        ("a%20b=1", {"a b": "1"}),
        ("x=a=b", {"x": "a=b"}),
        (f"task={NULL}", {"task": None}),
        ("task=", {"task": ""}),
        ("share=100%", {"share": "100%"}),
    ],
)
def test_names_and_values_are_decoded(folders: str, values: dict[str, str | None]) -> None:
    assert parse_partition(folders) == values


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["1", "-20", "0"], pa.int64()),
        (["1", None], pa.int64()),
        (["007"], pa.string()),
        (["-0"], pa.string()),
        (["+1"], pa.string()),
        (["1.5"], pa.string()),
        (["9" * 19], pa.string()),
        (["1", "x"], pa.string()),
        (["2024-01-31", "1999-12-01"], pa.date32()),
        (["2024-02-31"], pa.string()),
        (["2024-01-31", "1"], pa.string()),
        (["20240131"], pa.int64()),
        (["true"], pa.string()),
        ([""], pa.string()),
        ([None], pa.string()),
    ],
)
def test_types_are_inferred_from_all_values(values: list[str | None], kind: pa.DataType) -> None:
    assert infer_types([{"x": value} for value in values], [], {}) == {"x": kind}
    assert infer_types([{"x": value} for value in values], ["x"], {}) == {"x": pa.string()}


@pytest.mark.parametrize(
    ("values", "own", "kind"),
    [
        (["1"], pa.string(), pa.string()),
        (["1"], pa.int8(), pa.int8()),
        (["01"], pa.int64(), pa.int64()),
        (["1"], pa.float64(), pa.float64()),
        (["2024-01-31"], pa.timestamp("us"), pa.timestamp("us")),
        (["x"], pa.int64(), pa.string()),
        (["300"], pa.int8(), pa.int64()),
        (["1"], pa.list_(pa.int64()), pa.int64()),
        (["true", "False"], pa.bool_(), pa.bool_()),
        ([None], pa.int64(), pa.int64()),
    ],
)
def test_type_of_the_files_own_column_is_taken(values: list[str | None], own: pa.DataType, kind: pa.DataType) -> None:
    assert infer_types([{"x": value} for value in values], [], {"x": own}) == {"x": kind}


@pytest.mark.parametrize(
    ("folders", "problem"),
    [
        ("a=1/a=2", "two of the folders a=1/a=2 name the column 'a'"),
        ("task=a/Task=b", "two of the folders task=a/Task=b name the column 'Task'"),
        ("a=%FF", "the folder a=%FF is not UTF-8 behind its percent signs"),
        ("%E9=1", "the folder %E9=1 is not UTF-8"),
    ],
)
def test_ambiguous_folders_are_refused(folders: str, problem: str) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)):
        parse_partition(folders)


@given(st.integers(-(10**18) + 1, 10**18 - 1) | st.dates())
def test_typed_values_are_written_as_in_the_path(value: int | date) -> None:
    kind = infer_types([{"x": str(value)}], [], {})["x"]
    assert pa.scalar(str(value)).cast(kind).as_py() == value


def test_partition_columns_are_columns_of_the_rows(tmp_path: Path) -> None:
    write(tmp_path / "task=popqa" / "dt=2024-01-01" / "part-0.parquet", ["a", "b"])
    write(tmp_path / "task=pubhealth" / "dt=2024-01-02" / "part-0.parquet", ["c"])
    found = inspect(tmp_path)
    assert (found.tasks, found.partitions) == ({"popqa": 2, "pubhealth": 1}, ("task", "dt"))
    assert read(found).to_pylist() == [
        {"id": "a", "query": "q a", "task": "popqa", "dt": date(2024, 1, 1)},
        {"id": "b", "query": "q b", "task": "popqa", "dt": date(2024, 1, 1)},
        {"id": "c", "query": "q c", "task": "pubhealth", "dt": date(2024, 1, 2)},
    ]
    assert read(found).schema == found.schema


def test_columns_of_queries_stay_texts(tmp_path: Path) -> None:
    write(tmp_path / "task=7" / "year=2024" / "a.parquet", ["a"])
    found = inspect(tmp_path)
    assert (found.tasks, read(found)["year"].to_pylist()) == ({"7": 1}, [2024])


def test_null_partition_is_null(tmp_path: Path) -> None:
    write(tmp_path / f"task={NULL}" / "a.parquet", ["a"])
    write(tmp_path / "task=popqa" / "a.parquet", ["b"])
    found = inspect(tmp_path)
    assert (found.tasks, read(found)["task"].to_pylist()) == ({"popqa": 1}, [None, "popqa"])


def test_digest_depends_on_the_partition(tmp_path: Path) -> None:
    for name in ("plain", "x=1", "x=2"):
        write(tmp_path / name / name / "a.parquet", ["a"])
    digests = {inspect(tmp_path / name).digest for name in ("plain", "x=1", "x=2")}
    assert len(digests) == 3


@pytest.mark.parametrize(
    ("value", "own", "expected"),
    [
        ("popqa", pa.array(["popqa", "popqa"]), "popqa"),
        ("popqa", pa.array(["popqa", None]), "popqa"),
        ("popqa", pa.array([None, None], pa.string()), "popqa"),
        ("popqa", pa.nulls(2), "popqa"),
        ("popqa", pa.array(["popqa", None], pa.string_view()), "popqa"),
        ("popqa", pa.array(["popqa", None]).dictionary_encode(), "popqa"),
        ("7", pa.array([7, 7]), 7),
        ("01", pa.array([1, None]), 1),
        ("1.0", pa.array([1.0, 1.0]), 1.0),
        ("True", pa.array([True, None]), True),
        ("2024-01-01 00%3A00%3A00", pa.array([datetime(2024, 1, 1)] * 2), datetime(2024, 1, 1)),
        ("2024-01-01", pa.array([date(2024, 1, 1)] * 2), date(2024, 1, 1)),
        (NULL, pa.array([None, None], pa.string()), None),
    ],
)
def test_own_column_agrees_with_its_partition_or_is_filled(
    tmp_path: Path, value: str, own: pa.Array, expected: object
) -> None:
    write(tmp_path / f"label={value}" / "a.parquet", ["a", "b"], label=own)
    assert read(inspect(tmp_path))["label"].to_pylist() == [expected, expected]


def test_partition_takes_the_type_of_files_that_have_the_column(tmp_path: Path) -> None:
    write(tmp_path / "a=1" / "p.parquet", ["a"], a=["1"])
    write(tmp_path / "a=2" / "p.parquet", ["b"])
    assert read(inspect(tmp_path))["a"].to_pylist() == ["1", "2"]


def test_case_of_a_partition_column_does_not_count(tmp_path: Path) -> None:
    write(tmp_path / "Label=x" / "p.parquet", ["a", "b"], label=["x", None])
    assert read(inspect(tmp_path)).to_pylist() == [
        {"id": "a", "query": "q a", "label": "x"},
        {"id": "b", "query": "q b", "label": "x"},
    ]


@pytest.mark.parametrize(
    "values", [["popqa", "other"], [None, "other"], [1, 2], [["popqa"], ["popqa"]], ["POPQA", "POPQA"], [True, None]]
)
def test_column_that_contradicts_its_partition_is_refused(tmp_path: Path, values: list[object]) -> None:
    write(tmp_path / "label=popqa" / "a.parquet", ["a", "b"], label=values)
    with pytest.raises(
        ValueError, match="a.parquet: column 'label' differs from the partition label=popqa in the path"
    ):
        inspect(tmp_path)


def test_file_outside_of_the_partitions_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", ["a"])
    write(tmp_path / "task=popqa" / "a.parquet", ["b"])
    with pytest.raises(ValueError, match=r"/a.parquet: no column 'task', which .*task=popqa/a.parquet has"):
        inspect(tmp_path)
