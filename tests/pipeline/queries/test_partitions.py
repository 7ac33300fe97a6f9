from datetime import date
from pathlib import Path

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


def write(file: Path, ids: list[str], **columns: list[object]) -> None:
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
    assert infer_types([{"x": value} for value in values], []) == {"x": kind}
    assert infer_types([{"x": value} for value in values], ["x"]) == {"x": pa.string()}


@given(st.integers(-(10**18) + 1, 10**18 - 1) | st.dates())
def test_typed_values_are_written_as_in_the_path(value: int | date) -> None:
    kind = infer_types([{"x": str(value)}], [])["x"]
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
    ("folder", "values"),
    [
        ("task=popqa", ["popqa", "popqa"]),
        ("task=7", [7, 7]),
        (f"task={NULL}", [None, None]),
    ],
)
def test_column_that_agrees_with_its_partition_is_kept(tmp_path: Path, folder: str, values: list[object]) -> None:
    write(tmp_path / folder / "a.parquet", ["a", "b"], label=values)
    (tmp_path / folder).rename(tmp_path / folder.replace("task", "label"))
    assert read(inspect(tmp_path))["label"].to_pylist() == values


@pytest.mark.parametrize(
    "values", [["popqa", "other"], ["popqa", None], [None, None], [1, 2], [["popqa"], ["popqa"]], ["POPQA", "POPQA"]]
)
def test_column_that_contradicts_its_partition_is_refused(tmp_path: Path, values: list[object]) -> None:
    write(tmp_path / "label=popqa" / "a.parquet", ["a", "b"], label=values)
    with pytest.raises(
        ValueError, match="a.parquet: column 'label' differs from the partition label=popqa in its path"
    ):
        inspect(tmp_path)


def test_file_outside_of_the_partitions_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", ["a"])
    write(tmp_path / "task=popqa" / "a.parquet", ["b"])
    with pytest.raises(ValueError, match=r"/a.parquet: no column 'task', which .*task=popqa/a.parquet has"):
        inspect(tmp_path)
