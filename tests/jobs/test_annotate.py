"""The command's checks: bad input ends in one clear line and exit status 2 before anything starts."""

import dataclasses
import json
from collections.abc import Generator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner

from jobs.annotate import annotate as command
from pipeline.cluster import Resources
from pipeline.config.run import RunConfig
from pipeline.config.sections import StorageConfig
from pipeline.demo_models import build_demo_encoder
from pipeline.nodes.places import Source
from pipeline.output.folder import OutputFolder
from pipeline.output.inventory import Inventory
from pipeline.output.unit_files import UnitSummary, split_failed
from pipeline.queries.changes import Listing
from pipeline.queries.query_set import QuerySet
from pipeline.queries.units import Part, Unit
from pipeline.retrieval.reranker import find_reranker
from pipeline.run.annotation import build_annotated_schema
from pipeline.run.driver import Summary, annotate_todo
from pipeline.run.plan import RunPlan, check_run
from pipeline.run.sources import list_sources
from pipeline.storage.lease import Lease
from pipeline.storage.location import Location, locate
from tests.support.leases import finishing_elsewhere
from tests.support.rerankers import write_cross_encoder

GIVEN = pa.list_(pa.struct([("id", pa.string()), ("title", pa.string()), ("text", pa.string())]))


APP = typer.Typer()
APP.command()(command)


def query_set(folder: Path, name: str = "queries.parquet", **columns: pa.Array | list) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / name)
    return folder / name


@pytest.fixture
def queries(tmp_path: Path) -> Path:
    return query_set(tmp_path, id=["a", "b"], query=["Who?", "What?"])


def annotate(*arguments: str | Path, **environment: str):
    return CliRunner().invoke(APP, list(map(str, arguments)), env=environment)


def refused(result) -> str:
    """The one line on stderr of a refused command."""
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture
def options(queries: Path, tmp_path: Path, demo_model: Path) -> dict[str, str]:
    return {
        "--queries": str(queries),
        "--output": str(tmp_path / "out"),
        "--model": str(demo_model),
        "--set": "decoding.mode=never",
    }


def call(options: dict[str, str], *more: str, **environment: str):
    return annotate(*[word for pair in options.items() for word in pair], *more, **environment)


@pytest.mark.parametrize("place", ["", "/sub", "/.."])
@pytest.mark.parametrize("flag", ["--resume", "--overwrite"])
def test_output_overlapping_the_queries_is_refused(place, flag, options, tmp_path):
    folder = tmp_path / "deep" / "set"
    query_set(folder, id=["a"], query=["x"])
    output = folder.parent if place == "/.." else f"{folder}{place}"
    options |= {"--queries": str(folder), "--output": str(output)}
    assert "one contains the other" in refused(call(options, flag))
    assert (folder / "queries.parquet").exists()


def test_too_many_actors_are_refused_before_anything_is_deleted(options):
    result = call(options, "--set", "execution.actors=1000", "--overwrite")
    assert result.exit_code == 2
    assert result.stderr.strip().splitlines()[-1].startswith("error: execution.actors is 1000")
    assert not Path(options["--output"]).exists()


def test_wrong_credentials_are_reported_without_the_secret(options, s3):
    options["--queries"] = f"s3://{s3.bucket}/queries"
    wrong = {**s3.environment, "AWS_SECRET_ACCESS_KEY": "wrong-secret-value"}
    line = refused(call(options, **wrong))
    assert f"s3://{s3.bucket}/queries" in line
    assert "wrong-secret-value" not in line


def test_dry_run_prints_the_plan_and_writes_nothing(options):
    result = call(options, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "2 rows in 1 files" in result.stderr
    assert "2 rows in 1 units on 1 actor(s)" in result.stderr
    assert not Path(options["--output"]).exists()


def test_dry_run_names_the_partition_columns(options, tmp_path, caplog):
    folder = tmp_path / "day" / "dt=2024-01-31" / "task=popqa"
    folder.mkdir(parents=True)
    query_set(folder, id=["c", "d"], query=["Who?", "What?"])
    whole = call({**options, "--queries": str(tmp_path / "day")}, "--dry-run").stderr
    assert "columns  dt, task: read from the folders' names" in whole
    assert "task     popqa: 2 rows, profile popqa" in whole
    inside = call({**options, "--queries": str(folder)}, "--dry-run").stderr
    assert "task=popqa: columns that only its own path names are not read (dt, task)" in caplog.text
    assert "task     (none): 2 rows" in inside


def test_plan_records_the_index_and_its_encoder(options, saved: Location):
    run = {"queries": options["--queries"], "output": options["--output"], "model": {"name": options["--model"]}}
    plan = check_run(RunConfig.model_validate({**run, "index": saved.path}))
    assert plan.index is not None
    assert (plan.index["passages"], plan.index["shards"]) == (60, 3)
    assert plan.encoder is not None
    assert (plan.encoder["name"], plan.encoder["digest"]) == ("tiny", "d" * 64)
    assert "encoder" not in plan.compute_identity()


def test_plan_records_the_reranker_by_its_content(options, saved: Location, tmp_path):
    folder = write_cross_encoder(tmp_path / "reranker")
    run = {"queries": options["--queries"], "output": options["--output"], "model": {"name": options["--model"]}}
    run |= {"index": saved.path, "retrieval": {"rerank": {"model": str(folder), "candidates": 7}}}
    plan = check_run(RunConfig.model_validate(run))
    _, entry = find_reranker(plan.config.retrieval.rerank)
    assert plan.reranker == plan.compute_identity()["reranker"] == {"digest": entry.digest}
    assert f"reranker {folder}: orders the best 7" in plan.describe()
    assert Source.list_folder("retrieval.rerank.model", str(folder), "") in list_sources(plan)
    unused = check_run(RunConfig.model_validate({**run, "decoding": {"mode": "never"}}))
    assert unused.reranker is None


def test_model_that_is_no_reranker_is_refused_before_the_engine_starts(options, saved: Location):
    reads = {**options, "--index": saved.path, "--set": f"retrieval.rerank.model={build_demo_encoder()}"}
    assert "not a cross-encoder with one score, but BertModel; choose one such as" in refused(call(reads))


def test_run_with_a_held_lease_stops_before_the_engine_starts(options, monkeypatch):
    monkeypatch.setattr("jobs.annotate.allot_resources", lambda _plan: Resources(1, 0))
    with Lease(locate(options["--output"], StorageConfig())):
        result = call(options)
    assert result.exit_code == 2
    assert "another run is using this output (process" in result.stderr.splitlines()[-1]


def answer_all(plan, *_):
    """Answer the rows in the engine's place."""
    rows = [{"id": name, "query": name, "answer": "x", "retrieved": False} for name in ("a", "b")]
    table = pa.Table.from_pylist(rows, build_annotated_schema(plan.queries.schema, keep_candidates=False))
    files = split_failed(table, plan.queries.schema, keep_candidates=False)
    yield plan.output.write_unit(plan.todo[0].id, *files, plan.digest)


@pytest.fixture
def finished(options: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The output of a finished run; nothing can annotate any more."""
    monkeypatch.setattr("jobs.annotate.allot_resources", lambda _plan: Resources(1, 0))
    monkeypatch.setattr("pipeline.run.driver.annotate_units", answer_all)
    assert call(options).exit_code == 0
    monkeypatch.setattr(
        "pipeline.run.driver.annotate_units", lambda *_: pytest.fail("work that is done is not done again")
    )
    return tmp_path / "out"


def test_output_with_other_columns_is_not_resumed(options, finished):
    manifest = json.loads((finished / "_manifest.json").read_text())
    manifest["settings"]["output.columns"] = "of yore"
    (finished / "_manifest.json").write_text(json.dumps(manifest))
    assert "contains a run that differs in output.columns; choose another output" in refused(call(options))


def test_output_with_another_reranker_is_not_resumed(options, finished):
    manifest = json.loads((finished / "_manifest.json").read_text())
    manifest["reranker"] = {"digest": "f" * 64}
    (finished / "_manifest.json").write_text(json.dumps(manifest))
    assert "contains a run that differs in reranker; choose another output" in refused(call(options))


@pytest.mark.parametrize("damaged", ["cut", "swapped"])
def test_finished_set_with_a_damaged_unit_is_completed(
    damaged: str, options: dict[str, str], finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file,) = (finished / "data").iterdir()
    whole = file.read_bytes()
    monkeypatch.setattr("pipeline.run.driver.annotate_units", answer_all)
    file.write_bytes(whole[:-5]) if damaged == "cut" else pq.write_table(pq.read_table(file).slice(1), file)
    result = call(options)
    assert result.exit_code == 0, result.output
    assert "0 of 1 units already done" in result.stderr
    assert (finished / "_SUCCESS").exists()
    assert pq.read_table(file)["answer"].to_pylist() == ["x", "x"]


def test_finished_set_is_only_mended_under_its_lease(options: dict[str, str], finished: Path) -> None:
    (file,) = (finished / "data").iterdir()
    file.write_bytes(b"")
    with Lease(locate(str(finished), StorageConfig())):
        result = call(options)
    assert result.exit_code == 2
    assert "another run is using this output" in result.stderr.splitlines()[-1]
    assert (finished / "_SUCCESS").exists()
    assert file.exists()


def test_run_finished_by_another_while_waiting_does_nothing(options, finished, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.storage.lease.EXPIRY_S", 20.0)
    monkeypatch.setattr("pipeline.storage.lease.HEARTBEAT_S", 0.3)
    other = finishing_elsewhere(finished, tmp_path / "aside")
    result = call(options)
    other.join()
    assert result.exit_code == 0, result.output
    assert "1 units on 1 actor(s)" in result.stderr  # so it looked when it began
    assert "is already complete; nothing to do" in result.stderr


def failing(tmp_path: Path, rows: int) -> RunPlan:
    """A plan of so many rows."""
    config = RunConfig.model_validate({"queries": "q", "output": "o", "model": {"name": "m"}})
    queries = QuerySet(pa.schema([]), (), 1, rows, "d", False, {}, Listing(locate("q", StorageConfig()), {}))
    return RunPlan(config, queries, OutputFolder(locate(str(tmp_path / "out"), StorageConfig())), {}, None)


def fail_units(seen: list[int], *errors: int) -> Generator[UnitSummary]:
    """Units of a hundred rows each, of which so many fail; notes the numbers of those that were waited for."""
    for number, count in enumerate(errors):
        seen.append(number)
        yield UnitSummary(f"{number:020x}", 100, {"KeyError": count})


def unit(number: int, rows: int) -> Unit:
    return Unit(f"{number:020x}", (Part("q", "v", "d", "", 0, rows, 0, rows),))


def test_run_above_the_error_rate_stops_early(tmp_path):
    plan, seen = failing(tmp_path, 20_000), list[int]()
    with pytest.raises(RuntimeError, match=r"^270 of 400 rows failed \(KeyError\), more than execution.max_error_rate"):
        annotate_todo(plan, {}, Lease(plan.output.location), lambda _plan: fail_units(seen, 0, 90, 90, 90, 90))
    assert seen == [0, 1, 2, 3]


def test_errors_of_earlier_attempts_count_toward_the_error_rate(tmp_path):
    plan, seen = failing(tmp_path, 20_000), list[int]()
    units = [unit(n, 100) for n in range(4)]
    queries = dataclasses.replace(plan.queries, units=tuple(units))
    done = tuple(UnitSummary(unit.id, 100, {"KeyError": 30}) for unit in units)
    plan = dataclasses.replace(plan, queries=queries, inventory=Inventory(done, frozenset(), frozenset(), 0))
    with pytest.raises(RuntimeError, match=r"^210 of 500 rows failed"):
        annotate_todo(plan, {}, Lease(plan.output.location), lambda _plan: fail_units(seen, 90, 90))
    assert seen == [0]


def test_few_errors_do_not_stop_a_run_early(tmp_path):
    plan, seen = failing(tmp_path, 300), list[int]()
    done = annotate_todo(plan, {}, Lease(plan.output.location), lambda _plan: fail_units(seen, 0, 0, 100))
    assert done.keys() == {f"{n:020x}" for n in range(3)}
    assert seen == [0, 1, 2]


@pytest.mark.parametrize(("errors", "status"), [(0, 0), (1, 3), (2, 1)])
def test_exit_status_follows_the_error_rate(errors, status):
    summary = Summary("out", 100, errors, {}, 50, 1, 1, 100, 0, 1.0, max_error_rate=0.01)
    assert summary.exit_status == status


def test_finished_run_is_recognized_without_reading_the_queries(options, finished, monkeypatch):
    monkeypatch.setattr("pipeline.queries.query_set.inspect_file", lambda *_, **__: pytest.fail("is known"))
    result = call(options)
    assert result.exit_code == 0, result.output
    assert "is already complete; nothing to do" in result.stderr
