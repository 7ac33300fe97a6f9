"""Every type of column that a query set may have passes unchanged through a unit: data and errors."""

import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from pipeline.config.sections import StorageConfig
from pipeline.evaluation.evaluate import evaluate_set
from pipeline.output.folder import OutputFolder
from pipeline.output.unit_files import split_failed
from pipeline.queries.query_set import inspect_queries
from pipeline.queries.units import read_unit
from pipeline.report.write import write_report
from pipeline.run.annotation import annotate_table, build_annotated_schema
from pipeline.storage.location import locate
from tests.jobs.test_import_queries import APP as IMPORT
from tests.jobs.test_share import APP as SHARE
from tests.support.actors import CONFIG, system, table
from tests.support.reports import write_set as write_annotated_set

# Without large_list_view, which is refused since pyarrow 26 cannot read it, and lists of structs of views, which it
# cannot write.
DAY, TEXT = datetime.date(2020, 1, 31), pa.string_view()
TYPES: dict[str, tuple[pa.DataType, Any]] = {
    "null": (pa.null(), None),
    "bool": (pa.bool_(), True),
    "int8": (pa.int8(), -1),
    "uint64": (pa.uint64(), 2**63),
    "float16": (pa.float16(), 1.5),
    "double": (pa.float64(), 0.1),
    "decimal128": (pa.decimal128(5, 2), Decimal("1.50")),
    "decimal256": (pa.decimal256(50, 2), Decimal("1.50")),
    "date32": (pa.date32(), DAY),
    "time32": (pa.time32("ms"), datetime.time(1, 2, 3, 4000)),
    "timestamp": (pa.timestamp("us"), datetime.datetime(2020, 1, 31, 1, 2, 3, 4)),
    "timestamp with a zone": (pa.timestamp("us", "UTC"), datetime.datetime(2020, 1, 31, tzinfo=datetime.UTC)),
    "duration": (pa.duration("us"), datetime.timedelta(seconds=1)),
    "string": (pa.string(), "é"),
    "large_string": (pa.large_string(), "é"),
    "string_view": (TEXT, "a text of more than twelve bytes"),
    "binary": (pa.binary(), b"\xff"),
    "binary_view": (pa.binary_view(), b"\xff"),
    "fixed_size_binary": (pa.binary(2), b"\xff\x00"),
    "dictionary": (pa.dictionary(pa.int32(), pa.string()), "é"),
    "uuid": (pa.uuid(), UUID(int=7)),
    "json": (pa.json_(), '{"a": 1}'),
    "list": (pa.list_(pa.int64()), [1, None]),
    "list of views": (pa.list_(TEXT), ["é", None]),
    "large_list of views": (pa.large_list(TEXT), ["é"]),
    "fixed_size_list of views": (pa.list_(TEXT, 2), ["a", "b"]),
    "list_view": (pa.list_view(pa.string()), ["é"]),
    "list_view of views": (pa.list_view(TEXT), ["é", None]),
    "list of lists of views": (pa.list_(pa.list_(TEXT)), [["é"], None, []]),
    "struct": (pa.struct([("a", pa.int32()), ("b", pa.string())]), {"a": 1, "b": None}),
    "struct of views": (pa.struct([("a", TEXT), ("b", pa.list_(TEXT))]), {"a": "é", "b": ["x"]}),
    "list of structs": (pa.list_(pa.struct([("a", pa.string())])), [{"a": "é"}, {"a": None}]),
    "map of views": (pa.map_(TEXT, pa.list_(TEXT)), [("k", ["é"])]),
}


def write_set(file: Path, kind: pa.DataType, value: Any, texts: pa.DataType = TEXT) -> None:
    """Four rows, one of them without a query, and two without a value."""
    values = pa.array([value, None, value, None], kind)
    queries = pa.array(["one", "two", " ", "three"], texts)
    ids, answers = pa.array(["1", "2", "3", "4"], texts), pa.array([["x"], None, [], ["é"]], pa.list_(texts))
    pq.write_table(pa.table({"id": ids, "query": queries, "answers": answers, "x": values}), file)


@pytest.mark.parametrize("name", TYPES)
async def test_column_of_any_type_passes_through_data_and_errors(name: str, tmp_path: Path) -> None:
    kind, value = TYPES[name]
    write_set(tmp_path / "queries.parquet", kind, value)
    queries = inspect_queries(locate(str(tmp_path / "queries.parquet"), StorageConfig()), CONFIG.columns, 256)
    (unit,) = queries.units
    rows = read_unit(unit, queries.schema, StorageConfig())
    assert rows.schema == queries.schema
    annotated = await annotate_table(system(), rows, CONFIG)
    output = write_annotated_set(tmp_path / "out", finished=False)
    files = split_failed(annotated, rows.schema, keep_candidates=False)
    summary = output.write_unit(unit.id, *files, "")
    assert (summary.rows, summary.errors) == (4, {"ValueError": 1})
    data, errors = (pq.read_table(tmp_path / "out" / part).to_pylist() for part in ("data", "errors"))
    assert [(row["id"], row["x"], row["answers"]) for row in data] == [
        ("1", value, ["x"]),
        ("2", None, None),
        ("4", None, ["é"]),
    ]
    assert [(row["id"], row["x"], row["answers"]) for row in errors] == [("3", value, [])]
    check_finished_set(output, loadable=name not in ("uuid", "map of views"))


def check_finished_set(output: OutputFolder, loadable: bool) -> None:
    """Evaluate a set by its column, and write its report and its card."""
    manifest = output.read_manifest()
    assert manifest is not None
    output.finish(
        {
            **manifest,
            "tasks": {},
            "counts": {"rows": 4, "errors": 1, "retrieved": 0},
            "known": 0,
            "finished": "2025-01-01",
        },
        [],
    )
    groups = evaluate_set(output.location, by="x").by_group.values()
    assert (sum(group.rows for group in groups), sum(group.errors for group in groups)) == (3, 1)
    write_report(output.location)
    card = CliRunner().invoke(SHARE, ["--annotations", output.location.path])
    if not loadable:
        assert "error: out: column 'x' is " in card.stderr
        assert "which the library datasets cannot load" in card.stderr
        return
    assert card.exit_code == 0, card.output
    assert "`x` | unchanged from the query set |" in Path(output.location.path, "README.md").read_text()


@pytest.mark.parametrize("name", TYPES)
def test_column_of_any_type_is_imported(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.storage.lease.SETTLE_S", 0)
    kind, value = TYPES[name]
    write_set(tmp_path / "a.parquet", kind, value)
    options = ["--source", str(tmp_path / "a.parquet"), "--output", str(tmp_path / "set"), "--skip-bad"]
    result = CliRunner().invoke(IMPORT, options)
    assert result.exit_code == 3, result.stderr
    (file,) = (tmp_path / "set").iterdir()
    assert "view" not in str(pq.read_schema(file))
    assert [(row["id"], row["x"]) for row in pq.read_table(file).to_pylist()] == [
        ("1", value),
        ("2", None),
        ("4", None),
    ]
    inspect_queries(locate(str(file), StorageConfig()), CONFIG.columns, 256)


async def test_input_column_that_differs_from_an_output_column_only_in_case_is_renamed():
    found = await annotate_table(system(), table("one").rename_columns(["id", "query", "Answer"]), CONFIG)
    assert (found["answer"].to_pylist(), found["input_Answer"].to_pylist()) == (["one"], ["0"])
    assert len({name.casefold() for name in found.column_names}) == found.num_columns


async def test_schema_does_not_depend_on_the_batch():
    good = await annotate_table(system(), table("one"), CONFIG)
    bad = await annotate_table(system(), table("poison"), CONFIG)
    assert good.schema == bad.schema == build_annotated_schema(table("x").schema, keep_candidates=False)
