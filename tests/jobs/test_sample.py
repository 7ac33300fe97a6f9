"""A sample in, a forecast out."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.config.run import RunConfig
from pipeline.config.sections import ExecutionConfig, StorageConfig
from pipeline.output.folder import OutputFolder, hash_identity
from pipeline.run.driver import record_plan
from pipeline.run.forecast import forecast_run
from pipeline.run.plan import RunPlan, check_run, store_selection
from pipeline.storage.location import locate
from tests.faults.campaign import model_folder
from tests.faults.harness import Job
from tests.faults.harness import write_queries as write_given_queries
from tests.support.runs import ScriptedRun, write_queries


@pytest.fixture
def run(tmp_path: Path, demo_model: Path) -> ScriptedRun:
    for name in "abc":
        texts = {f"{name}{n}": "bad" if (name, n) == ("a", 0) else f"text {n}" for n in range(4)}
        write_queries(tmp_path / "queries" / f"{name}.parquet", **texts)
    return ScriptedRun(tmp_path / "queries", tmp_path / "sets" / "sample", demo_model)


def said(text: str, word: str) -> str:
    """The line that begins with a word."""
    return next(line for line in text.splitlines() if line.startswith(word))


def test_sample_forecasts_the_whole_set(run: ScriptedRun) -> None:
    result = run.annotate("--sample", "6", "--price-per-hour", "3600", "--json", "--set", "execution.actors=2")
    assert result.exit_code in (0, 3), result.stderr
    ids = [*pq.read_table(run.output / "data")["id"].to_pylist(), *(["a0"] if result.exit_code else [])]
    assert sorted(name[0] for name in ids) == ["a", "a", "b", "b", "c", "c"]
    summary = json.loads(result.stdout)
    assert (summary["rows"], summary["forecast"]["rows"], summary["forecast"]["measured"]) == (6, 12, 6)
    # One of two actors took four seconds for six rows, and its engine was full for three of them.
    assert summary["forecast"]["rows_per_second"] == {"low": 2 * 6 / 4, "high": 2 * 6 / 3}
    assert summary["forecast"]["cost"] == {"low": pytest.approx(2 * 12 / 4), "high": pytest.approx(2 * 12 / 3)}
    assert said(result.stderr, "sample ") == "sample   6 of 12 rows, seed 0"
    assert said(result.stderr, "forecast").startswith("forecast for 12 rows on 2 actor(s), from 6 rows of ")
    manifest = json.loads((run.output / "_manifest.json").read_text())
    assert (manifest["population"], manifest["configuration"]["sample"]) == (12, {"rows": 6, "seed": 0})


def test_finished_sample_is_not_drawn_again(run: ScriptedRun) -> None:
    assert run.annotate("--sample", "6").exit_code in (0, 3)
    before = (run.output / "_manifest.json").read_text()
    again = run.annotate("--sample", "6", "--set", "execution.actors=2", "--json")
    assert (json.loads(again.stdout)["annotated"], json.loads(again.stdout)["forecast"]["actors"]) == (0, 2)
    assert "forecast for 12 rows on 2 actor(s)" in again.stderr
    assert (run.output / "_manifest.json").read_text() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sample", "5"], "holds a sample of 6 rows (seed 0), not a sample of 5 rows (seed 0)"),
        (["--sample", "6", "--seed", "1"], "not a sample of 6 rows (seed 1)"),
        (["--seed", "1"], "error: --seed requires --sample\n"),
        ([], "differs in sample.rows, sample.seed, queries"),
        (["--sample", "0"], "configuration key sample.rows"),
        (["--sample", "6", "--seed", "-1"], "configuration key sample.seed"),
        (["--sample", "6", "--price-per-hour", "-1"], "configuration key execution.price_per_hour"),
    ],
)
def test_output_holds_one_sample(run: ScriptedRun, options: list[str], message: str) -> None:
    assert run.annotate("--sample", "6").exit_code in (0, 3)
    result = run.annotate(*options)
    assert result.exit_code == 2
    assert message in result.stderr


def test_rows_of_a_sample_can_be_skipped(run: ScriptedRun, tmp_path: Path) -> None:
    assert run.annotate("--sample", "6").exit_code in (0, 3)
    rest = ScriptedRun(run.queries, tmp_path / "sets" / "rest", run.model)
    result = rest.annotate("--set", f"skip_annotated={tmp_path / 'sets'}")
    assert result.exit_code in (0, 3), result.stderr
    answered = [*run.read_answers(), *rest.read_answers()]
    assert len(answered) == len(set(answered)) == 11  # all but the one that fails


def test_dry_run_forecasts_from_the_newest_set_of_the_same_kind(
    run: ScriptedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.run.forecast.FEWEST_ROWS", 6)
    other = ScriptedRun(run.queries, tmp_path / "sets" / "other", run.model)
    assert json.loads(other.annotate("--dry-run", "--json").stdout) == {"forecast": None}
    assert run.annotate("--sample", "6").exit_code in (0, 3)
    (tmp_path / "sets" / "strange").mkdir()
    (tmp_path / "sets" / "strange" / "_SUCCESS").touch()
    (tmp_path / "sets" / "strange" / "_manifest.json").write_text('{"format_version": 1, "settings": [1]}')
    result = other.annotate("--dry-run", "--price-per-hour", "2", "--json")
    assert said(result.stderr, "forecast") == f"forecast for 12 rows on 1 actor(s), from 6 rows of {run.output}:"
    assert json.loads(result.stdout)["forecast"]["measured"] == 6
    for setting in ("decoding.max_tokens=7", "execution.units_in_flight=9", "model.engine.max_num_seqs=9"):
        assert "forecast for" not in other.annotate("--dry-run", "--set", setting).stderr
    newer = ScriptedRun(run.queries, tmp_path / "sets" / "newer", run.model)
    assert newer.annotate().exit_code == 3
    assert "from 12 rows" in said(other.annotate("--dry-run").stderr, "forecast")
    assert "forecast for" not in newer.annotate("--dry-run").stderr  # nothing is left
    monkeypatch.setattr("pipeline.run.forecast.FEWEST_ROWS", 13)
    assert "forecast for" not in other.annotate("--dry-run").stderr


def test_run_that_adopts_the_sample_of_another_one_says_so_in_its_manifest(run: ScriptedRun) -> None:
    """Two runs draw at the same time, for other numbers of actors; the second one to begin takes the first one's."""

    def plan(actors: int) -> RunPlan:
        values = {"queries": str(run.queries), "output": str(run.output), "model": {"name": str(run.model)}}
        execution = {"actors": actors, "units_in_flight": 1}
        decoding = {"mode": "never"}
        return check_run(
            RunConfig.model_validate({**values, "execution": execution, "decoding": decoding, "sample": {"rows": 6}})
        )

    own, other = plan(1), plan(3)
    assert (own.config.execution.unit_rows, other.config.execution.unit_rows) == (6, 2)
    store_selection(other)
    stored = store_selection(own)
    assert (stored.config.execution.unit_rows, len(stored.queries.units)) == (2, 3)
    assert hash_identity(record_plan(stored)) == stored.digest == other.digest
    assert plan(5).digest == other.digest  # and so does one that resumes


@pytest.mark.slow
def test_forecast_is_within_15_percent_of_the_run(tmp_path: Path) -> None:
    """Two actors, whose engines decode two requests at a time; the sample is an eighth of the rows."""
    queries = tmp_path / "queries"
    write_given_queries(queries, 1600)
    model = model_folder(tmp_path)
    (model / "slots").write_text("2")
    settings = ["execution.unit_rows=auto", "execution.actors=2", "decoding.passages=3"]

    def finish(name: str, *options: str) -> OutputFolder:
        job = Job(str(queries), str(tmp_path / name), model, settings, list(options))
        status, said = job.finish()
        assert status == 0, said[-3000:]
        return OutputFolder(locate(job.output, StorageConfig()))

    sample, run = finish("sample", "--sample", "200"), finish("run")
    found = forecast_run(sample, 1600, ExecutionConfig(actors=2)).hours
    manifest = run.read_manifest()
    assert found is not None
    assert manifest is not None
    assert [3600 * (found.low or 0), 3600 * (found.high or 0)] == pytest.approx(
        2 * [manifest["counts"]["seconds"]], rel=0.15
    )
