"""A run in, its record in OpenLineage and MLflow out."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from pipeline.storage.lease import OutputInUseError
from tests.support.lineage import LineageServer, check_event, serving_lineage
from tests.support.runs import ScriptedRun, write_queries


@pytest.fixture
def run(tmp_path: Path, demo_model: Path) -> ScriptedRun:
    write_queries(tmp_path / "queries" / "a.parquet", a1="one", a2="bad", a3="three", a4="four")
    return ScriptedRun(tmp_path / "queries", tmp_path / "out", demo_model)


@pytest.fixture
def lineage(monkeypatch: pytest.MonkeyPatch) -> Iterator[LineageServer]:
    with serving_lineage() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("OPENLINEAGE_NAMESPACE", "team")
        yield server


@pytest.fixture
def mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """A client of a store of its own."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    return MlflowClient(f"file://{tmp_path}/mlruns")


LINEAGE = ("--set", "tracking.openlineage=nightly")
MLFLOW = ("--set", "tracking.mlflow=answers")


def states(server: LineageServer) -> list[str]:
    return [event["eventType"] for event in server.events]


def recorded(client: MlflowClient) -> Any:
    """The only run of the experiment."""
    experiment = client.get_experiment_by_name("answers")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    return found


def end_run() -> None:
    raise RuntimeError("the cluster is gone")


def test_events_name_what_a_run_reads_and_writes(run: ScriptedRun, lineage: LineageServer) -> None:
    assert run.annotate(*LINEAGE).exit_code == 3
    assert states(lineage) == ["START", "COMPLETE"]
    for event in lineage.events:
        check_event(event)
    start, complete = lineage.events
    assert start["run"]["runId"] == complete["run"]["runId"]
    assert (start["job"]["namespace"], start["job"]["name"]) == ("team", "nightly")
    assert start["eventTime"] < complete["eventTime"]
    manifest = json.loads((run.output / "_manifest.json").read_text())
    (queries,), (answers,) = complete["inputs"], complete["outputs"]
    assert (queries["namespace"], queries["name"]) == ("file", str(run.queries))
    assert queries["facets"]["version"]["datasetVersion"] == manifest["queries"]["digest"]
    assert [field["name"] for field in queries["facets"]["schema"]["fields"]] == ["id", "query"]
    assert (answers["namespace"], answers["name"]) == ("file", str(run.output))
    columns = {field["name"]: field for field in answers["facets"]["schema"]["fields"]}
    assert (columns["answer"]["type"], columns["segments"]["type"]) == ("string", "array")
    (element,) = columns["segments"]["fields"]
    assert (element["name"], element["type"], element["fields"][0]["name"]) == ("_element", "struct", "text")
    assert answers["outputFacets"]["outputStatistics"]["rowCount"] == 3
    assert start["outputs"][0]["outputFacets"] == {}


def test_failed_run_is_told_with_its_cause(run: ScriptedRun, lineage: LineageServer, mlflow: MlflowClient) -> None:
    result = run.annotate(*LINEAGE, *MLFLOW, change=end_run, after=1)
    assert result.exit_code == 1
    assert states(lineage) == ["START", "FAIL"]
    check_event(lineage.events[1])
    assert lineage.events[1]["run"]["facets"]["errorMessage"]["message"] == "the cluster is gone"
    found = recorded(mlflow)
    assert (found.info.status, found.data.tags["selfrag.message"]) == ("FAILED", "the cluster is gone")


def test_run_with_too_many_failed_rows_has_failed(run: ScriptedRun, lineage: LineageServer) -> None:
    assert run.annotate(*LINEAGE, "--set", "execution.max_error_rate=0.1").exit_code == 1
    assert states(lineage) == ["START", "FAIL"]
    assert lineage.events[1]["run"]["facets"]["errorMessage"]["message"] == "1 of 4 rows failed"
    assert lineage.events[1]["outputs"][0]["outputFacets"] == {}


def test_run_that_its_budget_ends_is_aborted_and_goes_on_as_another(
    run: ScriptedRun, lineage: LineageServer, mlflow: MlflowClient
) -> None:
    budget = ("--set", "execution.max_hours=1")
    assert run.annotate(*LINEAGE, *MLFLOW, *budget, units=1).exit_code == 3
    assert recorded(mlflow).info.status == "KILLED"
    assert recorded(mlflow).data.metrics["left"] == 2
    assert run.annotate(*LINEAGE, *budget).exit_code == 3
    assert states(lineage) == ["START", "ABORT", "START", "COMPLETE"]
    check_event(lineage.events[1])
    assert "execution.max_hours = 1 is spent: 2 rows are left" in json.dumps(lineage.events[1])
    assert len({event["run"]["runId"] for event in lineage.events}) == 2


def test_interrupted_run_is_aborted(run: ScriptedRun, lineage: LineageServer) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    assert run.annotate(*LINEAGE, change=interrupt, after=1).exit_code != 0
    assert states(lineage) == ["START", "ABORT"]
    assert lineage.events[1]["run"]["facets"]["errorMessage"]["message"] == "interrupted"


def test_runs_that_do_nothing_are_not_recorded(run: ScriptedRun, lineage: LineageServer) -> None:
    assert run.annotate(*LINEAGE, "--dry-run").exit_code == 0
    assert run.annotate(*LINEAGE, "--set", "columns.id=none").exit_code == 2
    assert lineage.events == []
    assert run.annotate(*LINEAGE).exit_code == 3
    assert run.annotate(*LINEAGE).exit_code == 3  # finished already
    assert states(lineage) == ["START", "COMPLETE"]


def test_nothing_is_recorded_by_default(run: ScriptedRun, lineage: LineageServer, mlflow: MlflowClient) -> None:
    assert run.annotate().exit_code == 3
    assert lineage.events == []
    assert mlflow.get_experiment_by_name("answers") is None


@pytest.mark.parametrize(("refusing", "told"), [(1, ["START", "COMPLETE"]), (2, ["COMPLETE"]), (3, [])])
def test_service_that_fails_does_not_end_a_run(
    run: ScriptedRun,
    lineage: LineageServer,
    caplog: pytest.LogCaptureFixture,
    refusing: int,
    told: list[str],
) -> None:
    lineage.refusing = refusing
    assert run.annotate(*LINEAGE).exit_code == 3
    assert (run.output / "_SUCCESS").exists()
    assert states(lineage) == told  # what could not be told at the start is told at the end
    warnings = [record.getMessage() for record in caplog.records if "does not record" in record.getMessage()]
    assert len(warnings) == refusing
    assert warnings[0].startswith("OpenLineage does not record this run: ")


def test_service_that_does_not_answer_holds_up_no_run(
    run: ScriptedRun, lineage: LineageServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.tracking.track.PATIENCE_S", 0.2)
    lineage.answering.clear()
    assert run.annotate(*LINEAGE).exit_code == 3
    warnings = [record.getMessage() for record in caplog.records if "OpenLineage" in record.getMessage()]
    assert warnings == ["OpenLineage has not answered within 0.2 s; the run goes on"]


def test_service_that_answers_late_is_told_of_the_end(
    run: ScriptedRun, lineage: LineageServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.tracking.track.PATIENCE_S", 0.2)
    lineage.answering.clear()
    assert run.annotate(*LINEAGE, change=lineage.answering.set, after=1).exit_code == 3
    assert states(lineage) == ["START", "COMPLETE"]


def test_refused_run_is_not_recorded(
    run: ScriptedRun, lineage: LineageServer, mlflow: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_lease: Any) -> None:
        raise OutputInUseError("another run is using this output")

    monkeypatch.setattr("pipeline.run.driver.Lease.__enter__", refuse)
    assert run.annotate(*LINEAGE, *MLFLOW).exit_code == 2
    assert lineage.events == []
    assert mlflow.get_experiment_by_name("answers") is None


def test_logins_of_services_are_not_logged(
    run: ScriptedRun, lineage: LineageServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"http://name:p@hush@127.0.0.1:{lineage.server_port}"
    monkeypatch.setenv("OPENLINEAGE__TRANSPORT__URL", address)
    lineage.refusing, lineage.refusal = 9, 400
    result = run.annotate(*LINEAGE)
    assert (result.exit_code, lineage.refusing) == (3, 6)
    assert "http://…@127.0.0.1" in caplog.text
    assert "hush" not in caplog.text + result.stderr


def test_run_that_mlflow_knows_in_part_is_not_made_again(
    run: ScriptedRun, mlflow: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_batch, calls = MlflowClient.log_batch, list[int]()

    def fail_once(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise OSError("the connection was reset")
        return log_batch(*args, **options)

    monkeypatch.setattr(MlflowClient, "log_batch", fail_once)
    assert run.annotate(*MLFLOW).exit_code == 3
    assert (recorded(mlflow).info.status, recorded(mlflow).data.metrics["rows"]) == ("FINISHED", 4)
    assert recorded(mlflow).data.params["queries.rows"] == "4"


@pytest.mark.parametrize("refused", ["metrics", "params"])
def test_run_ends_in_mlflow_even_without_its_figures(
    run: ScriptedRun, mlflow: MlflowClient, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    def refuse(*_: Any, **options: Any) -> None:
        if refused in options:
            raise OSError("the connection was reset")

    monkeypatch.setattr(MlflowClient, "log_batch", refuse)
    assert run.annotate(*MLFLOW).exit_code == 3
    assert recorded(mlflow).info.status == "FINISHED"


def test_sample_has_no_version_of_the_whole_set(run: ScriptedRun, lineage: LineageServer) -> None:
    assert run.annotate(*LINEAGE, "--sample", "2").exit_code in (0, 3)
    (queries,) = lineage.events[0]["inputs"]
    assert (queries["name"], list(queries["facets"])) == (str(run.queries), ["schema"])


def test_mlflow_has_the_settings_and_figures_of_a_run(run: ScriptedRun, mlflow: MlflowClient) -> None:
    secret = ("--set", "storage.secret_key=hush", "--set", "storage.access_key=name")
    assert run.annotate(*MLFLOW, *secret, "--set", "decoding.threshold=0.3").exit_code == 3
    found = recorded(mlflow)
    assert (found.info.status, found.info.run_name) == ("FINISHED", "out")
    assert found.info.start_time < found.info.end_time
    manifest = json.loads((run.output / "_manifest.json").read_text())
    params = found.data.params
    assert params["configuration.decoding.threshold"] == "0.3"
    assert (params["queries.digest"], params["queries.rows"]) == (manifest["queries"]["digest"], "4")
    assert params["versions.ray"] == manifest["versions"]["ray"]
    assert found.data.tags["selfrag.output"] == str(run.output)
    assert "hush" not in json.dumps(params)
    metrics = found.data.metrics
    assert (metrics["rows"], metrics["errors"], metrics["errors.KeyError"], metrics["error_share"]) == (4, 1, 1, 0.25)
    assert (metrics["prompt_tokens"], metrics["generated_tokens"], metrics["retrieved_share"]) == (30, 9, 0)
    assert metrics["rows_per_second"] == pytest.approx(metrics["annotated"] / metrics["seconds"])


@pytest.mark.parametrize(
    ("option", "package", "message"),
    [
        (LINEAGE, "openlineage.client", "tracking.openlineage needs the package openlineage-python: pip install "),
        (MLFLOW, "mlflow.tracking", "tracking.mlflow needs the package mlflow-skinny: pip install "),
    ],
)
def test_missing_package_ends_the_command(
    run: ScriptedRun, monkeypatch: pytest.MonkeyPatch, option: tuple[str, str], package: str, message: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    called = run.output.parent / "called"
    result = run.annotate(*option, "--set", f"on_failure.command=[touch, {called}]")
    assert result.exit_code == 2
    assert f"error: {message}" in result.stderr
    assert called.exists()
    assert not run.output.exists()


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_mlflow_without_a_server_ends_the_command(
    run: ScriptedRun, monkeypatch: pytest.MonkeyPatch, dry: tuple[str, ...]
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    result = run.annotate(*MLFLOW, *dry)
    assert result.exit_code == 2
    assert "error: tracking.mlflow: MLFLOW_TRACKING_URI is not set, so there is no server\n" in result.stderr
