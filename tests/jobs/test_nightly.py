"""Runs on a schedule: by date, over new queries only, one at a time, and told of when they fail."""

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner, Result

from jobs.annotate import annotate
from pipeline.cluster import Resources
from pipeline.config.sections import StorageConfig
from pipeline.output.unit_files import split_failed
from pipeline.queries.units import read_unit
from pipeline.run.annotation import build_annotated_schema
from pipeline.storage.lease import Lease
from pipeline.storage.location import locate

APP = typer.Typer()
APP.command()(annotate)


def answers(plan, *_):
    """In the engine's place: an answer for each row, and an error for what cannot be answered."""
    for unit in plan.todo:
        rows = [
            {**row, "error_type": "ValueError", "error_message": "no", "attempts": 1}
            if row["query"] == "bad"
            else {**row, "answer": row["query"].upper(), "retrieved": False}
            for row in read_unit(unit, plan.queries.schema, StorageConfig()).to_pylist()
        ]
        table = pa.Table.from_pylist(rows, build_annotated_schema(plan.queries.schema, keep_candidates=False))
        files = split_failed(table, plan.queries.schema, keep_candidates=False)
        yield plan.output.write_unit(unit.id, *files, plan.digest)


@pytest.fixture(autouse=True)
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.annotate.allot_resources", lambda _plan: Resources(1, 0))
    monkeypatch.setattr("pipeline.run.driver.annotate_units", answers)
    monkeypatch.setattr("pipeline.storage.lease.SETTLE_S", 0.05)


@pytest.fixture
def queries(tmp_path: Path) -> Path:
    file = tmp_path / "queries.parquet"
    ask(file, a="one", b="bad", c="three")
    return file


def ask(file: Path, **texts: str) -> None:
    pq.write_table(pa.table({"id": list(texts), "query": list(texts.values())}), file)


@pytest.fixture
def nightly(queries: Path, tmp_path: Path, demo_model: Path) -> dict[str, Any]:
    """A run's file, as a schedule has it."""
    return {
        "queries": str(queries),
        "output": f"{tmp_path}/sets/{{date}}",
        "skip_annotated": f"{tmp_path}/sets",
        "model": str(demo_model),
        "decoding": {"mode": "never"},
        "execution": {"max_error_rate": 0.5},
    }


def call(tree: dict[str, Any], *options: str, folder: Path | None = None) -> Result:
    file = Path(tree["queries"]).parent / "run.yaml"
    file.write_text(json.dumps(tree))
    return CliRunner().invoke(APP, ["--config", str(file), *options])


def rows(folder: Path) -> dict[str, str]:
    table = ds.dataset(folder / "data", format="parquet").to_table()
    return dict(zip(table["id"].to_pylist(), table["answer"].to_pylist(), strict=True))


def test_each_night_annotates_only_queries_not_yet_answered_or_failed(nightly, queries, tmp_path):
    assert call(nightly, "--date", "2026-01-30").exit_code == 3
    assert rows(tmp_path / "sets/2026-01-30") == {"a": "ONE", "c": "THREE"}
    ask(queries, a="one", b="bad", c="three", d="four")
    second = call(nightly, "--date", "2026-01-31")
    assert second.exit_code == 0, second.output
    assert f"skipped  3 rows already answered or failed below {tmp_path}/sets" in second.stderr
    assert rows(tmp_path / "sets/2026-01-31") == {"d": "FOUR"}
    manifest = json.loads((tmp_path / "sets/2026-01-31/_manifest.json").read_text())
    assert (manifest["counts"]["rows"], manifest["counts"]["errors"], manifest["known"]) == (1, 0, 3)
    assert manifest["configuration"]["output"] == f"{tmp_path}/sets/2026-01-31"
    ask(queries, a="one", c="three", d="four")
    third = call(nightly, "--date", "2026-02-01")
    assert third.exit_code == 0, third.output
    line = f"all 3 queries are already answered or failed below {tmp_path}/sets; nothing is left to do"
    assert third.stderr.splitlines() == [line]
    assert not (tmp_path / "sets/2026-02-01").exists()


def test_interrupted_night_resumes_with_its_own_rows(nightly, tmp_path, monkeypatch):
    nightly["execution"]["unit_rows"] = 1

    def killed(plan, *_):
        yield next(answers(plan))
        raise RuntimeError("the machine is gone")

    with monkeypatch.context() as patched:
        patched.setattr("pipeline.run.driver.annotate_units", killed)
        assert call(nightly, "--date", "2026-01-30").exit_code == 1
    assert rows(tmp_path / "sets/2026-01-30") == {"a": "ONE"}
    again = call(nightly, "--date", "2026-01-30")
    assert "1 of 3 units already done" in again.stderr
    assert rows(tmp_path / "sets/2026-01-30") == {"a": "ONE", "c": "THREE"}
    finished = call(nightly, "--date", "2026-01-30")
    assert finished.exit_code == 3
    assert "is already complete; nothing to do" in finished.stderr


def test_queries_added_later_are_left_to_the_next_night(nightly, queries, tmp_path):
    assert call(nightly, "--date", "2026-01-30").exit_code == 3
    ask(queries, a="one", z="new")
    again = call(nightly, "--date", "2026-01-30")
    assert again.exit_code == 3
    assert "is already complete; nothing to do" in again.stderr
    assert call(nightly, "--date", "2026-01-31").exit_code == 0
    assert rows(tmp_path / "sets/2026-01-31") == {"z": "NEW"}


def test_different_query_set_is_refused_for_the_same_night(nightly, tmp_path):
    assert call(nightly, "--date", "2026-01-30").exit_code == 3
    ask(tmp_path / "other.parquet", a="one")
    result = call(nightly | {"queries": f"{tmp_path}/other.parquet"}, "--date", "2026-01-30")
    assert result.exit_code == 2
    assert f"2026-01-30/_queries was selected from {tmp_path}/queries.parquet; choose another" in result.stderr


def test_overwrite_selects_queries_again_only_after_the_checks_pass(nightly, queries, tmp_path, monkeypatch):
    assert call(nightly, "--date", "2026-01-30").exit_code == 3
    before = {file: file.read_bytes() for file in (tmp_path / "sets").rglob("*") if file.is_file()}
    ask(queries, z="new")

    def away(_plan):
        raise ValueError("no Ray")

    with monkeypatch.context() as patched:
        patched.setattr("jobs.annotate.allot_resources", away)
        assert call(nightly, "--date", "2026-01-30", "--overwrite").exit_code == 2
    assert {file: file.read_bytes() for file in (tmp_path / "sets").rglob("*") if file.is_file()} == before
    assert call(nightly, "--date", "2026-01-30", "--overwrite").exit_code == 0
    assert rows(tmp_path / "sets/2026-01-30") == {"z": "NEW"}


def test_foreign_folder_is_left_unchanged(nightly, tmp_path):
    (tmp_path / "sets/2026-01-30").mkdir(parents=True)
    (tmp_path / "sets/2026-01-30/theirs.txt").write_text("x")
    result = call(nightly, "--date", "2026-01-30")
    assert result.exit_code == 2
    assert "contains files that are not part of an annotated set" in result.stderr
    assert [file.name for file in (tmp_path / "sets/2026-01-30").iterdir()] == ["theirs.txt"]


def test_output_can_be_the_lock(nightly, tmp_path):
    nightly |= {"skip_annotated": None, "output": f"{tmp_path}/out", "execution": {"lock": f"{tmp_path}/out/"}}
    assert call(nightly | {"queries": nightly["queries"]}).exit_code == 1  # more errors than the default allows
    assert (tmp_path / "out/_SUCCESS").exists()


def test_dry_run_selects_queries_and_writes_nothing(nightly, queries, tmp_path):
    assert call(nightly, "--date", "2026-01-30").exit_code == 3
    ask(queries, a="one", d="four", e="five")
    before = sorted((tmp_path / "sets").rglob("*"))
    result = call(nightly, "--date", "2026-01-31", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "2 rows in 1 units" in result.stderr
    assert sorted((tmp_path / "sets").rglob("*")) == before


def test_date_can_have_a_format_and_defaults_to_today(nightly, tmp_path):
    nightly["output"] = f"{tmp_path}/sets/{{date:%Y/%m}}/day-{{date:%d}}"
    assert call(nightly, "--date", "2026-01-30").exit_code == 3
    assert (tmp_path / "sets/2026/01/day-30/_SUCCESS").exists()
    nightly |= {"output": f"{tmp_path}/{{date}}", "skip_annotated": None}
    assert call(nightly).exit_code == 3
    assert len(list(tmp_path.glob("20??-??-??/_SUCCESS"))) == 1


def test_invalid_date_is_refused(nightly):
    assert call(nightly, "--date", "yesterday").exit_code == 2


@pytest.mark.parametrize("setting", ["skip_annotated", "lock"])
def test_nightly_run_with_a_held_lock_stops_at_once(nightly, tmp_path, setting):
    if setting == "lock":
        nightly |= {"skip_annotated": None, "execution": {"lock": f"{tmp_path}/sets"}}
    with Lease(locate(f"{tmp_path}/sets", StorageConfig())):
        result = call(nightly, "--date", "2026-01-30")
        assert call(nightly, "--date", "2026-01-30", "--dry-run").exit_code == 0
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path}/sets: another run is using this output (process ")
    assert not (tmp_path / "sets/2026-01-30").exists()


class Ear(BaseHTTPRequestHandler):
    """Hears what is posted; answers with the server's next status."""

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.heard.append((self.path, json.loads(content)))  # type: ignore[attr-defined]
        self.send_response(self.server.statuses.pop(0))  # type: ignore[attr-defined]
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def web() -> Iterator[HTTPServer]:
    server = HTTPServer(("127.0.0.1", 0), Ear)
    server.heard, server.statuses = [], []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def told(nightly: dict[str, Any], web: HTTPServer, tmp_path: Path) -> dict[str, Any]:
    script = "import sys; open(sys.argv[1], 'a').write(sys.stdin.read() + chr(10))"
    command = [sys.executable, "-c", script, f"{tmp_path}/heard.jsonl"]
    return nightly | {"on_failure": {"command": command, "webhook": f"http://127.0.0.1:{web.server_port}/key-abc"}}


def test_failure_notifies_the_command_and_the_webhook(told, web, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("the machine is gone")

    monkeypatch.setattr("pipeline.run.driver.annotate_units", broken)
    web.statuses = [500, 200]
    result = call(told, "--date", "2026-01-30")
    assert result.exit_code == 1
    output = f"{tmp_path}/sets/2026-01-30"
    record = {"output": output, "status": 1, "error": "the machine is gone"}
    record["text"] = f"selfrag-batch: {output} failed with status 1: the machine is gone"
    assert web.heard == [("/key-abc", record)] * 2  # the first time in vain
    assert [json.loads(line) for line in (tmp_path / "heard.jsonl").read_text().splitlines()] == [record]
    assert "key-abc" not in (tmp_path / "sets/2026-01-30/_manifest.json").read_text() + result.output


def test_refusal_sends_a_notification(told, web, tmp_path):
    web.statuses = [200]
    assert call(told | {"queries": f"{tmp_path}/none"}, "--date", "2026-01-30").exit_code == 2
    ((_, record),) = web.heard
    assert (record["status"], record["error"]) == (2, f"{tmp_path}/none: not found")


def test_success_and_dry_runs_send_no_notification(told, web, tmp_path):
    assert call(told, "--date", "2026-01-30").exit_code == 3
    assert call(told, "--date", "2026-01-30", "--dry-run").exit_code == 0
    assert call(told | {"queries": f"{tmp_path}/none"}, "--date", "2026-02-01", "--dry-run").exit_code == 2
    assert web.heard == []
    assert not (tmp_path / "heard.jsonl").exists()


@pytest.mark.parametrize(
    ("path", "kind"), [("key-abc", "URLError"), ("key-abc…", "UnicodeEncodeError"), ("key-abc x", "InvalidURL")]
)
def test_failed_notification_does_not_change_the_exit_status(told, tmp_path, caplog, path, kind):
    told["on_failure"] = {"command": ["/no/such/program", "key-abc"], "webhook": f"http://127.0.0.1:1/{path}"}
    result = call(told | {"queries": f"{tmp_path}/none"})
    assert result.exit_code == 2
    warnings = [record.message for record in caplog.records if record.name == "pipeline.run.notices"]
    whys = ("FileNotFoundError: /no/such/program", kind)
    assert warnings == [f"on_failure: notification failed: {why}" for why in whys]
    assert "key-abc" not in result.output


def test_webhook_must_be_http_and_its_address_is_not_printed(told):
    told["on_failure"]["webhook"] = "file:///key-abc"
    result = call(told)
    assert result.exit_code == 2
    assert "configuration key on_failure.webhook: expected http://… or https://…" in result.stderr
    assert "key-abc" not in result.output


def test_too_many_failed_rows_send_a_notification(told, web):
    told["execution"]["max_error_rate"] = 0.1
    web.statuses = [200]
    result = call(told, "--date", "2026-01-30")
    assert result.exit_code == 1
    message = "1 of 3 rows failed, more than execution.max_error_rate allows"
    assert result.stderr.splitlines()[-1] == f"error: {message}"
    ((_, record),) = web.heard
    assert (record["status"], record["error"]) == (1, message)


def test_unreachable_lock_is_named_in_one_line(nightly):
    nightly["execution"]["lock"] = "s3://bucket/lock"
    nightly["storage"] = {"endpoint_url": "http://127.0.0.1:1", "region": "us-east-1", "patience_s": 0}
    nightly["storage"] |= {"access_key": "a", "secret_key": "b"}
    result = call(nightly, "--date", "2026-01-30")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("error: s3://bucket/lock")
