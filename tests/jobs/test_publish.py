"""Publishing: a finished set in, one commit in a real Delta or Iceberg table, however often it is repeated."""

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import deltalake
import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyiceberg.catalog import Catalog, load_catalog
from pyiceberg.utils.config import Config

from jobs.compact import compact
from jobs.publish import publish
from pipeline.config.sections import StorageConfig
from pipeline.output.folder import OutputFolder
from pipeline.publishing.delta import DeltaTable
from pipeline.publishing.published_set import FinishedFiles
from tests.support.compaction import at, call, compacted, upload
from tests.support.runs import ScriptedRun, write_queries
from tests.support.s3 import S3Server

ANSWERED = ["a", "b", "d", "e", "g", "h"]


@pytest.fixture
def catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Catalog]:
    """An Iceberg catalog in SQLite with the namespace ``answers``, as ``local`` in pyiceberg's variables."""
    (tmp_path / "warehouse").mkdir()
    monkeypatch.setenv("PYICEBERG_CATALOG__LOCAL__TYPE", "sql")
    monkeypatch.setenv("PYICEBERG_CATALOG__LOCAL__URI", f"sqlite:///{tmp_path}/catalog.db")
    monkeypatch.setenv("PYICEBERG_CATALOG__LOCAL__WAREHOUSE", f"file://{tmp_path}/warehouse")
    monkeypatch.setattr("pyiceberg.catalog._ENV_CONFIG", Config())  # read once, on import
    made = load_catalog("local")
    made.create_namespace("answers")
    yield made
    made.close()


def move(run: ScriptedRun, folder: Path) -> ScriptedRun:
    """The run with its set in another folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(run.output, folder)
    return ScriptedRun(run.queries, folder, run.model)


def published(run: ScriptedRun, *options: str) -> str:
    result = call(publish, "--annotations", str(run.output), *options)
    assert result.exit_code == 0, result.output
    return str(result.stderr.strip())


def refused(run: ScriptedRun, *options: str, status: int = 2) -> str:
    result = call(publish, "--annotations", str(run.output), *options)
    assert result.exit_code == status, result.output
    return str(result.stderr.strip().splitlines()[-1])


def test_a_set_is_committed_to_a_delta_table_once(copied_run: ScriptedRun, tmp_path: Path):
    table = str(tmp_path)
    assert published(copied_run, "--delta", table) == f"published: 6 rows in delta {table}"
    assert sorted(pl.read_delta(table)["id"]) == ANSWERED
    assert published(copied_run, "--delta", table) == f"delta {table} has this set already"
    found = deltalake.DeltaTable(table)
    assert (found.version(), found.to_pyarrow_table().num_rows) == (0, 6)
    assert found.history()[0]["selfrag.output"] == str(copied_run.output)


def test_a_compacted_set_is_the_same_set(copied_run: ScriptedRun, tmp_path: Path):
    shutil.copytree(copied_run.output, tmp_path / "copy")
    published(copied_run, "--delta", str(tmp_path))
    again = ScriptedRun(copied_run.queries, tmp_path / "copy", copied_run.model)
    compacted(again)
    assert published(again, "--delta", str(tmp_path)).startswith(f"not published: delta {tmp_path} was given this run")
    assert pl.read_delta(str(tmp_path)).height == 6


def test_files_of_a_published_set_are_not_replaced(copied_run: ScriptedRun, tmp_path: Path):
    published(copied_run, "--delta", str(tmp_path))
    assert json.loads((copied_run.output / "_published.json").read_text()) == [f"delta {tmp_path}"]
    reason = f"is published in delta {tmp_path}, which lists its files; use another output"
    again = copied_run.annotate("--overwrite")
    assert (again.exit_code, reason in again.stderr) == (2, True)
    in_place = call(compact, "--annotations", str(copied_run.output))
    assert (in_place.exit_code, reason in in_place.stderr) == (2, True)
    compacted(copied_run, "--output", str(tmp_path / "small"))
    assert not (tmp_path / "small" / "_published.json").exists()
    assert pl.read_delta(str(tmp_path)).height == 6
    assert copied_run.annotate().exit_code == 3


def test_folders_between_table_and_set_are_partitions(copied_run: ScriptedRun, tmp_path: Path):
    table = tmp_path / "answers"
    first = move(copied_run, table / "date=2026-11-28" / "task=qa%20long")
    write_queries(tmp_path / "later" / "a.parquet", i="nine", j="ten")
    later = ScriptedRun(tmp_path / "later", table / "date=2026-11-29" / "task=qa", first.model)
    assert later.annotate().exit_code == 0
    for run in (first, later):
        published(run, "--delta", str(table))
        assert published(run, "--delta", str(table)) == f"delta {table} has this set already"
    found = pl.read_delta(str(table)).group_by("date", "task").agg(pl.col("id").sort()).sort("date").to_dicts()
    assert found == [
        {"date": "2026-11-28", "task": "qa long", "id": ANSWERED},
        {"date": "2026-11-29", "task": "qa", "id": ["i", "j"]},
    ]
    assert deltalake.DeltaTable(table).version() == 1
    other = move(first, table / "plain")
    assert "is partitioned by date, task, unlike" in refused(other, "--delta", str(table))


@pytest.mark.parametrize("error", [deltalake.exceptions.CommitFailedError, OSError])
def test_a_commit_whose_answer_was_lost_is_not_repeated(
    copied_run: ScriptedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
):
    commit = DeltaTable._commit

    def commit_and_fail(table: DeltaTable, *rest: Any) -> None:
        commit(table, *rest)
        raise error("connection reset")

    monkeypatch.setattr(DeltaTable, "_commit", commit_and_fail)
    published(copied_run, "--delta", str(tmp_path))
    assert deltalake.DeltaTable(tmp_path).version() == 0
    assert pl.read_delta(str(tmp_path)).height == 6


def test_a_commit_that_always_fails_is_one_line(
    copied_run: ScriptedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object) -> None:
        raise Exception("native stack\n \x1b[31m0: frame")  # noqa: TRY002  as delta-rs does

    monkeypatch.setattr(DeltaTable, "_commit", fail)
    line = refused(copied_run, "--delta", str(tmp_path), status=1)
    assert line == f"error: {tmp_path}: native stack 0: frame"


def test_publishers_at_once_commit_a_set_once(copied_run: ScriptedRun, tmp_path: Path):
    found = FinishedFiles.of(OutputFolder(at(copied_run.output)))
    others = [replace(found, run=f"other{number}", files=found.files[number : number + 1]) for number in range(2)]
    with ThreadPoolExecutor(6) as threads:
        new = list(threads.map(DeltaTable(str(tmp_path), StorageConfig()).publish, [found, *others] * 2))
    assert all("new" in pair for pair in zip(new[:3], new[3:], strict=True))
    log = [json.loads(line) for file in (tmp_path / "_delta_log").glob("*.json") for line in file.open()]
    assert sum("metaData" in action for action in log) == 1
    assert sorted(action["txn"]["appId"] for action in log if "txn" in action) == sorted(
        f"selfrag-batch:{one.run}" for one in [found, *others]
    )


def test_a_set_is_committed_to_an_iceberg_table_once(copied_run: ScriptedRun, catalog: Catalog):
    name = ("--iceberg", "local.answers.nightly")
    assert published(copied_run, *name) == "published: 6 rows in iceberg local.answers.nightly"
    assert published(copied_run, *name) == "iceberg local.answers.nightly has this set already"
    table = catalog.load_table("answers.nightly")
    assert sorted(table.scan().to_arrow()["id"].to_pylist()) == ANSWERED
    assert sorted(pl.scan_iceberg(table).collect()["id"]) == ANSWERED
    assert len(table.snapshots()) == 1
    assert str(copied_run.output) in table.properties.values()


def test_columns_without_nulls_make_no_constraints(copied_run: ScriptedRun, tmp_path: Path, catalog: Catalog):
    """Other sets of the table may have nulls there."""
    schema = pa.schema([pa.field("id", pa.string(), nullable=False), ("query", pa.string())])
    pq.write_table(pa.table({"id": ["a"], "query": ["one"]}, schema), tmp_path / "queries.parquet")
    run = ScriptedRun(tmp_path / "queries.parquet", tmp_path / "t" / "out", copied_run.model)
    assert run.annotate().exit_code == 0
    tables = ("--delta", str(tmp_path / "t"), "--iceberg", "local.answers.nightly")
    assert published(run, *tables).count("published: 1 rows") == 2
    assert published(run, *tables).count("has this set already") == 2


def test_an_iceberg_table_without_its_snapshots_still_knows_the_run(copied_run: ScriptedRun, catalog: Catalog):
    name = ("--iceberg", "local.answers.nightly")
    published(copied_run, *name)
    table = catalog.load_table("answers.nightly")
    table.append(table.scan().to_arrow().slice(0, 1))
    table.maintenance.expire_snapshots().by_ids([table.snapshots()[0].snapshot_id]).commit()
    assert published(copied_run, *name) == "iceberg local.answers.nightly has this set already"
    assert catalog.load_table("answers.nightly").scan().to_arrow().num_rows == 7


def test_an_iceberg_table_with_other_columns_is_refused(copied_run: ScriptedRun, catalog: Catalog):
    catalog.create_table("answers.nightly", pa.schema([("id", pa.int64())]))
    line = refused(copied_run, "--iceberg", "local.answers.nightly")
    assert "column 'id' is string in the set and int64 in the table" in line
    assert "the catalog has no such namespace" in refused(copied_run, "--iceberg", "local.others.nightly")
    assert "URI missing" in refused(copied_run, "--iceberg", "unknown.answers.nightly")
    assert "expected CATALOG.NAMESPACE.TABLE" in refused(copied_run, "--iceberg", "answers.nightly")


def test_a_delta_table_with_other_columns_is_refused(copied_run: ScriptedRun, tmp_path: Path):
    deltalake.write_deltalake(tmp_path / "t", pa.table({"id": [1]}))
    moved = move(copied_run, tmp_path / "t" / "out")
    assert "column 'id' is string in the set and int64 in the table" in refused(moved, "--delta", str(tmp_path / "t"))


def test_a_delta_table_with_constraints_is_refused(copied_run: ScriptedRun, tmp_path: Path):
    published(copied_run, "--delta", str(tmp_path))
    deltalake.DeltaTable(tmp_path).alter.add_constraint({"short": "id < 'zz'"})
    assert "has constraints (delta.constraints.short)" in refused(copied_run, "--delta", str(tmp_path))


def test_files_that_changed_since_are_not_called_published(copied_run: ScriptedRun, tmp_path: Path):
    published(copied_run, "--delta", str(tmp_path))
    with next((copied_run.output / "data").iterdir()).open("ab") as file:
        file.write(b"more")
    line = refused(copied_run, "--delta", str(tmp_path), status=1)
    assert f"lists other versions of the files of {copied_run.output}" in line


def test_paths_with_dots_are_refused(copied_run: ScriptedRun, tmp_path: Path):
    (tmp_path / "t").mkdir()
    away = ScriptedRun(copied_run.queries, tmp_path / "t" / ".." / "out", copied_run.model)
    assert "without '..'" in refused(away, "--delta", str(tmp_path / "t"))


def test_a_token_of_other_credentials_is_refused(copied_run: ScriptedRun, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token")
    keys = [word for key in ("access_key", "secret_key") for word in ("--set", f"storage.{key}=x")]
    line = refused(copied_run, "--delta", "s3://bucket/t", "--set", "storage.region=us-east-1", *keys)
    assert "AWS_SESSION_TOKEN does not belong to storage.access_key; unset it" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--delta", "elsewhere"], "must be below the table"),
        ([], "give --delta or --iceberg, or both"),
    ],
)
def test_bad_usage_is_one_line(copied_run: ScriptedRun, options: list[str], message: str):
    assert message in refused(copied_run, *options)


def test_unfinished_and_incomplete_sets_are_refused(copied_run: ScriptedRun, tmp_path: Path):
    next((copied_run.output / "data").iterdir()).unlink()
    assert "its data files are not those that it lists" in refused(copied_run, "--delta", str(tmp_path))
    (copied_run.output / "_SUCCESS").unlink()
    assert "not a finished annotated set" in refused(copied_run, "--delta", str(tmp_path))


def test_a_run_publishes_its_set(copied_run: ScriptedRun, tmp_path: Path, catalog: Catalog):
    output = tmp_path / "answers" / "date=2026-11-29"
    tables = ("--set", f"publish={{delta: {tmp_path}/answers, iceberg: local.answers.nightly}}")
    run = ScriptedRun(copied_run.queries, output, copied_run.model)
    cut = run.annotate(*tables, units=2)
    assert cut.exit_code == 1
    assert not (tmp_path / "answers" / "_delta_log").exists()
    result = run.annotate(*tables, "--json")
    assert result.exit_code == 3
    assert [one["state"] for one in json.loads(result.stdout)["published"]] == ["new", "new"]
    assert f"published: 6 rows in delta {tmp_path}/answers" in result.stderr
    again = run.annotate(*tables)
    assert "has this set already" in again.stderr
    assert pl.read_delta(f"{tmp_path}/answers").height == 6
    assert catalog.load_table("answers.nightly").scan().to_arrow().num_rows == 6


def test_a_run_that_cannot_be_published_is_finished_and_says_so(
    copied_run: ScriptedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(DeltaTable, "publish", fail)
    run = ScriptedRun(copied_run.queries, tmp_path / "answers" / "out", copied_run.model)
    result = run.annotate("--set", f"publish.delta={tmp_path}/answers", "--json")
    record = json.loads(result.stdout)
    assert (result.exit_code, record["exit_status"], record["rows"], record["published"]) == (1, 1, 8, [])
    command = f"selfrag publish --annotations {run.output} --delta {tmp_path}/answers"
    problem = f"no space left; to publish it, run: {command}"
    assert record["publish_error"] == problem
    last = result.stderr.strip().splitlines()[-1]
    assert last == f"error: the annotated set is complete, but not published: {problem}"
    assert (run.output / "_SUCCESS").exists()


def test_a_sample_is_not_published(copied_run: ScriptedRun, tmp_path: Path):
    run = ScriptedRun(copied_run.queries, tmp_path / "answers" / "sample", copied_run.model)
    assert run.annotate("--sample", "4", "--set", f"publish.delta={tmp_path}/answers").exit_code in (0, 3)
    assert not (tmp_path / "answers" / "_delta_log").exists()
    assert "a sample is not published" in refused(run, "--delta", str(tmp_path / "answers"))


def test_a_column_that_no_table_holds_is_named_before_the_run(copied_run: ScriptedRun, tmp_path: Path):
    table = pa.table({"id": ["a"], "query": ["one"], "size": pa.array([1], pa.uint64())})
    pq.write_table(table, tmp_path / "queries.parquet")
    run = ScriptedRun(tmp_path / "queries.parquet", tmp_path / "t" / "out", copied_run.model)
    result = run.annotate("--set", f"publish.delta={tmp_path}/t")
    assert result.exit_code == 2
    assert "a table cannot hold the column 'size' of type uint64" in result.stderr
    assert not run.output.exists()


@pytest.mark.slow
def test_a_set_on_s3_is_committed_once(copied_run: ScriptedRun, s3: S3Server, monkeypatch: pytest.MonkeyPatch):
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    place = at(f"s3://{s3.bucket}/answers")
    upload(copied_run.output, place / "out")
    options = ["--annotations", f"{place.uri}/out", "--delta", place.uri]
    first, second = call(publish, *options), call(publish, *options)
    assert first.stderr.strip() == f"published: 6 rows in delta {place.uri}"
    assert second.stderr.strip() == f"delta {place.uri} has this set already"
    found = deltalake.DeltaTable(place.uri, storage_options={"AWS_ALLOW_HTTP": "true"})
    listed = {file.uri for file in (place / "out" / "data").list_files()}
    assert (found.version(), set(found.file_uris())) == (0, listed)


def test_other_engines_read_the_files_alike(copied_run: ScriptedRun):
    files = f"{copied_run.output}/data/*.parquet"
    assert sorted(pl.read_parquet(files)["id"]) == ANSWERED
    query = f"SELECT id, usage.generated_tokens FROM '{files}' ORDER BY id"
    rows = duckdb.connect().execute(query).fetchall()
    assert rows == [(name, 3) for name in ANSWERED]
