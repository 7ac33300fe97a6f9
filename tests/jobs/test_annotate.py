"""The command's checks: bad input ends in one clear line and exit status 2 before anything starts."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner

from jobs.annotate import Summary, annotate_todo
from jobs.annotate import annotate as command
from jobs.cluster import Resources
from pipeline.claim import Claim
from pipeline.config import RunConfig, StorageConfig
from pipeline.output import OutputFolder, UnitSummary
from pipeline.plan import Plan
from pipeline.query_set import QuerySet
from pipeline.storage import locate

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


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"id": ["a"], "question": ["Who?"]}, "no column 'query'; it has id, question"),
        ({"query": ["Who?"]}, "no column 'id'; it has query"),
        ({"id": ["a", None], "query": ["x", "y"]}, "column 'id' is null in row 1"),
        ({"id": ["a", "b", "a"], "query": ["x", "y", "z"]}, "id 'a' is not unique"),
        ({"id": [1, 2], "query": ["x", "y"]}, "column 'id' is int64, expected string"),
        ({"id": ["a"], "query": [["x"]]}, "column 'query' is list"),
        ({"id": ["a"], "query": ["x"], "choices": ["A,B"]}, "column 'choices' is string, expected list<string>"),
        ({"id": ["a"], "query": ["x"], "passages": [["text"]]}, "column 'passages' is list"),
        (
            {"id": ["a"], "query": ["x"], "answer": ["y"], "input_answer": ["z"]},
            "columns 'answer' and 'input_answer' would both be written as 'input_answer'",
        ),
        ({"id": ["a"], "query": ["x"], "answers": ["Paris"]}, "column 'answers' is string, expected list<string>"),
        ({"id": pa.array([], pa.string()), "query": pa.array([], pa.string())}, "the query set has no rows"),
    ],
)
def test_bad_query_set_is_refused(columns, message, options, tmp_path):
    options["--queries"] = str(query_set(tmp_path / "bad", **columns))
    line = refused(call(options))
    assert message in line
    assert options["--queries"] in line or "not unique" in line
    assert not Path(options["--output"]).exists()


def test_duplicate_id_across_files_names_both(options, tmp_path):
    for name in ("one.parquet", "two.parquet"):
        query_set(tmp_path / "set", name, id=[name, "same"], query=["x", "y"])
    options["--queries"] = str(tmp_path / "set")
    line = refused(call(options))
    assert "one.parquet row 1" in line
    assert "two.parquet row 1" in line


def test_files_of_different_schemas_are_refused(options, tmp_path):
    query_set(tmp_path / "set", "one.parquet", id=["a"], query=["x"], year=[1])
    query_set(tmp_path / "set", "two.parquet", id=["b"], query=["y"], year=["1"])
    options["--queries"] = str(tmp_path / "set")
    assert "two.parquet: its schema differs" in (line := refused(call(options)))
    assert "column 'year' is string, not int64" in line


def test_unreadable_parquet_is_named(options, tmp_path):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nothing of the kind PAR1")
    options["--queries"] = str(tmp_path / "broken.parquet")
    assert "broken.parquet: not a readable Parquet file" in refused(call(options))


@pytest.mark.parametrize("missing", ["nowhere", "nowhere/queries.parquet"])
def test_missing_query_set_is_named(missing, options, tmp_path):
    options["--queries"] = str(tmp_path / missing)
    assert f"{missing}: not found" in refused(call(options))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("decoding.treshold=0.3", "unknown configuration key decoding.treshold"),
        ("decoding.threshold=1.5", "configuration key decoding.threshold: input should be less than or equal to 1"),
        ("decoding.weights.support=-1", "configuration key decoding.weights.support"),
        ("decoding.passages=0", "configuration key decoding.passages"),
        ("decoding.mode=sometimes", "configuration key decoding.mode"),
        ("decoding", "expected KEY=VALUE"),
        ("index=i", "index.json is missing"),
    ],
)
def test_bad_configuration_is_refused(setting, message, options):
    options["--set"] = "decoding.mode=always"
    assert message in refused(call(options, "--set", setting))


def test_unknown_engine_argument_is_refused(options):
    line = refused(call(options, "--set", "model.engine.tensor_paralel_size=2"))
    assert "unknown configuration key model.engine.tensor_paralel_size" in line


def test_required_options_are_named():
    assert "missing configuration key queries (flag --queries)" in refused(annotate())


def test_unknown_key_in_the_file_is_named(options, tmp_path):
    (tmp_path / "run.yaml").write_text("decoding:\n  depth: 3\n")
    assert "unknown configuration key decoding.depth" in refused(call(options, "--config", str(tmp_path / "run.yaml")))


def test_index_is_asked_for_when_there_are_no_passages(options):
    options["--set"] = "decoding.mode=adaptive"
    assert "--index is missing" in refused(call(options))


def test_model_without_reflection_tokens_is_refused(options):
    from pipeline.embedded import demo_base_model

    options["--model"] = str(demo_base_model())
    assert "its tokenizer lacks 15 of 15 reflection tokens" in refused(call(options))


def test_missing_model_is_refused(options, tmp_path):
    options["--model"] = str(tmp_path / "no-model")
    assert "its tokenizer cannot be loaded" in refused(call(options))


def test_index_of_another_encoder_is_refused(options, small_index, tmp_path):
    manifest = json.loads((small_index / "index.json").read_text())
    other = tmp_path / "index"
    other.mkdir()
    for file in small_index.iterdir():
        os.link(file, other / file.name)
    (other / "index.json").unlink()
    manifest["encoder"]["digest"] = "0" * 64
    (other / "index.json").write_text(json.dumps(manifest))
    options |= {"--index": str(other), "--set": "decoding.mode=always"}
    assert "is not the one that the index was built with" in refused(call(options))


def test_output_of_something_else_is_left_alone(options, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    assert "holds files of something else" in refused(call(options))
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


def test_doubled_column_is_refused(options, tmp_path):
    table = pa.table([["a"], ["x"], ["1"], ["2"]], names=["id", "query", "note", "note"])
    pq.write_table(table, tmp_path / "double.parquet")
    options["--queries"] = str(tmp_path / "double.parquet")
    assert "2 columns are named 'note'" in refused(call(options))


@pytest.mark.parametrize("place", ["", "/sub", "/.."])
@pytest.mark.parametrize("flag", ["--resume", "--overwrite"])
def test_output_over_the_queries_is_refused(place, flag, options, tmp_path):
    folder = tmp_path / "deep" / "set"
    query_set(folder, id=["a"], query=["x"])
    output = folder.parent if place == "/.." else f"{folder}{place}"
    options |= {"--queries": str(folder), "--output": str(output)}
    assert "lie in one another" in refused(call(options, flag))
    assert (folder / "queries.parquet").exists()


def test_overwriting_what_no_run_has_written_is_refused(options, tmp_path):
    kept = query_set(tmp_path / "out" / "data", "train-00000.parquet", id=["mine"])
    assert "holds files of something else" in refused(call(options, "--overwrite"))
    assert kept.exists()


def test_too_many_actors_are_refused_before_anything_is_deleted(options):
    result = call(options, "--set", "execution.actors=1000", "--overwrite")
    assert result.exit_code == 2
    assert result.stderr.strip().splitlines()[-1].startswith("error: execution.actors is 1000")
    assert not Path(options["--output"]).exists()


def test_missing_output_bucket_is_named(options, s3):
    options["--output"] = "s3://no-such-bucket/out"
    assert "--output s3://no-such-bucket/out: no bucket 'no-such-bucket' there" in refused(
        call(options, **s3.environment)
    )


def test_missing_bucket_is_named(options, s3):
    options["--queries"] = "s3://no-such-bucket/queries"
    assert "s3://no-such-bucket/queries" in refused(call(options, **s3.environment))


def test_wrong_credentials_are_named_and_not_shown(options, s3):
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


def test_a_run_that_another_one_is_at_work_on_stops_before_the_engine(options, monkeypatch):
    monkeypatch.setattr("jobs.annotate.allot", lambda _plan: Resources(1, 0))
    with Claim(locate(options["--output"], StorageConfig())):
        result = call(options)
    assert result.exit_code == 2
    assert "another run is at work there (process" in result.stderr.splitlines()[-1]


def failing(tmp_path: Path, rows: int, monkeypatch: pytest.MonkeyPatch, *errors: int) -> tuple[Plan, list[int]]:
    """A plan of units of a hundred rows each, of which so many fail."""
    seen = []

    def units(*_):
        for number, count in enumerate(errors):
            seen.append(number)
            yield UnitSummary(f"{number:020x}", 100, {"KeyError": count})

    monkeypatch.setattr("jobs.annotate.annotate_units", units)
    config = RunConfig.model_validate({"queries": "q", "output": "o", "model": {"name": "m"}})
    queries = QuerySet(pa.schema([]), (), 1, rows, "d", False, {})
    return Plan(config, queries, OutputFolder(locate(str(tmp_path / "out"), StorageConfig())), {}, None), seen


def test_a_run_that_fails_at_large_stops_early(tmp_path, monkeypatch):
    plan, seen = failing(tmp_path, 20_000, monkeypatch, 0, 90, 90, 90, 90)
    with pytest.raises(RuntimeError, match=r"^270 of 400 rows failed \(KeyError\), more than execution.max_error_rate"):
        annotate_todo(plan, Resources(1, 0), {})
    assert seen == [0, 1, 2, 3]


def test_few_errors_stop_no_run_early(tmp_path, monkeypatch):
    plan, seen = failing(tmp_path, 300, monkeypatch, 0, 0, 100)
    assert annotate_todo(plan, Resources(1, 0), {}) == 300
    assert seen == [0, 1, 2]


@pytest.mark.parametrize(("errors", "status"), [(0, 0), (1, 3), (2, 1)])
def test_exit_status_follows_the_error_rate(errors, status):
    summary = Summary("out", 100, errors, {}, 50, 1, 1, 100, 1.0, max_error_rate=0.01)
    assert summary.exit_status == status
