"""Runs whose budget is spent before all rows are annotated."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.faults.campaign import model_folder
from tests.faults.harness import Job
from tests.faults.harness import write_queries as write_given_queries
from tests.support.runs import ScriptedRun, write_queries

COST = ["--price-per-hour", "2", "--set", "execution.max_cost=5"]


@pytest.fixture
def run(tmp_path: Path, demo_model: Path) -> ScriptedRun:
    write_queries(tmp_path / "queries.parquet", a="a", b="bad", c="c", d="d", e="e")
    return ScriptedRun(tmp_path / "queries.parquet", tmp_path / "out", demo_model)


def test_run_ends_when_its_budget_is_spent_and_goes_on_with_the_same_command(run: ScriptedRun) -> None:
    result = run.annotate(*COST, "--json", units=2)
    assert result.exit_code == 3, result.stderr
    summary = json.loads(result.stdout)
    found = {key: summary[key] for key in ("rows", "errors", "annotated", "left", "budget", "exit_status", "forecast")}
    assert found == {
        "rows": 5,
        "errors": 1,
        "annotated": 4,
        "left": 1,
        "budget": "execution.max_cost = 5",
        "exit_status": 3,
        "forecast": None,
    }
    assert "3 of 5 rows answered, 1 in errors/; 4 in this run" in result.stderr
    left = "execution.max_cost = 5 is spent: 1 rows are left; the same command continues with them"
    assert left in result.stderr.splitlines()
    assert not (run.output / "_SUCCESS").exists()
    assert not (run.output / "report.html").exists()
    again = run.annotate(*COST)
    assert again.exit_code == 3  # a row failed
    assert "is spent" not in again.stderr
    assert (run.output / "_SUCCESS").exists()
    assert sorted(run.read_answers()) == ["a", "c", "d", "e"]


def test_overwriting_command_would_begin_anew(run: ScriptedRun) -> None:
    result = run.annotate(*COST, "--overwrite", units=2)
    assert "1 rows are left; the same command without --overwrite continues with them" in result.stderr
    again = run.annotate(*COST, units=2)
    assert "1 in this run" in again.stderr
    assert (run.output / "_SUCCESS").exists()


def test_plan_names_the_budget(run: ScriptedRun) -> None:
    result = run.annotate(*COST, "--dry-run")
    assert "budget   2.5 h from the start of the actors (execution.max_cost = 5)" in result.stderr.splitlines()


def test_budget_in_which_nothing_ends_is_a_failure(run: ScriptedRun) -> None:
    result = run.annotate("--set", "execution.max_hours=0.25", units=0)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == (
        "error: execution.max_hours = 0.25 was spent before any unit ended: starting the actors takes its time, and so "
        "does a unit of 2 rows; allow more"
    )


def test_units_that_are_missing_without_a_budget_are_a_failure(run: ScriptedRun) -> None:
    result = run.annotate(units=2)
    assert result.exit_code == 1
    assert "4 of 5 rows are complete, in 2 of 3 units; rerun the same command to continue" in result.stderr


def test_too_many_errors_are_a_failure_even_if_rows_are_left(run: ScriptedRun) -> None:
    result = run.annotate(*COST, "--set", "execution.max_error_rate=0.1", units=2)
    assert result.exit_code == 1
    assert "1 of 5 rows failed, more than execution.max_error_rate allows" in result.stderr


def test_sample_forecasts_nothing_until_it_is_finished(run: ScriptedRun) -> None:
    sample = ["--sample", "4", *COST]
    result = run.annotate(*sample, units=1)
    assert result.exit_code == 3
    assert "forecast for" not in result.stderr
    assert "forecast for 5 rows" in run.annotate(*sample).stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["execution.max_hours=0"], "configuration key execution.max_hours"),
        (["execution.max_hours=inf"], "configuration key execution.max_hours"),
        (["execution.max_cost=5"], "max_cost needs price_per_hour"),
        (["execution.grace_s=-1"], "configuration key execution.grace_s"),
    ],
)
def test_wrong_budgets_are_refused(run: ScriptedRun, settings: list[str], message: str) -> None:
    result = run.annotate(*(word for setting in settings for word in ("--set", setting)))
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.slow
def test_actors_begin_no_unit_that_would_end_too_late(tmp_path: Path) -> None:
    """Thirty units of three seconds each, one after another, in 36 seconds with the start of the actor."""
    write_given_queries(tmp_path / "queries", 300, {10 * unit: "HANGS" for unit in range(30)})
    settings = ["execution.units_in_flight=1", "execution.row_timeout_s=3", "execution.max_error_rate=1"]
    budget = ["execution.max_hours=0.01"]
    job = Job(str(tmp_path / "queries"), str(tmp_path / "out"), model_folder(tmp_path), settings + budget)
    status, said = job.finish()
    assert status == 3, said
    assert "execution.max_hours = 0.01 is spent" in said
    files: list[Any] = [pq.read_table(file) for file in (tmp_path / "out" / "data").glob("*.parquet")]
    assert 1 <= len(files) <= 11
    job.settings = [*settings, "execution.row_timeout_s=0.3"]
    status, said = job.finish()
    assert status == 3, said
    assert f"{300 - 10 * len(files)} in this run" in said
    assert "270 of 300 rows answered, 30 in errors/" in said
