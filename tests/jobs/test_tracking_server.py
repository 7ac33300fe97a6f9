"""A run recorded in a real MLflow server."""

import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from tests.faults.harness import wait_for
from tests.support.runs import ScriptedRun, write_queries
from tests.support.uvx import UVX

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(UVX is None, reason="uv is not installed, which fetches the server"),
    pytest.mark.timeout(600),
]


@contextmanager
def serving_mlflow(folder: Path) -> Iterator[str]:
    """An MLflow server on loopback, in an environment of its own; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(UVX), "--from", "mlflow", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--workers", "1"]
    with (folder / "mlflow.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, start_new_session=True)
    try:
        wait_for(lambda: is_healthy(port), 300)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=60)


def is_healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def test_server_has_the_settings_and_figures_of_runs(
    tmp_path: Path, demo_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_queries(tmp_path / "queries" / "a.parquet", a1="one", a2="bad", a3="three", a4="four")
    with serving_mlflow(tmp_path) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        for name in ("first", "second"):
            run = ScriptedRun(tmp_path / "queries", tmp_path / name, demo_model)
            assert run.annotate("--set", "tracking.mlflow=answers").exit_code == 3
        client = MlflowClient(address)
        experiment = client.get_experiment_by_name("answers")
        assert experiment is not None
        found = {one.info.run_name: one for one in client.search_runs([experiment.experiment_id])}
    assert sorted(found) == ["first", "second"]
    for one in found.values():
        assert one.info.status == "FINISHED"
        assert (one.data.metrics["rows"], one.data.metrics["errors"]) == (4, 1)
        assert one.data.params["configuration.decoding.mode"] == "never"
        assert len(one.data.params) > 40
