"""The dashboard's queries, answered by a real Prometheus that scrapes a run with the real engine."""

import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.run.telemetry import encode_label
from tests.faults.harness import wait_for
from tests.faults.series import cluster
from tests.infra.test_grafana import BOARD

SERVER = shutil.which("prometheus")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(SERVER is None, reason="no Prometheus is installed (Debian: apt install prometheus)"),
    pytest.mark.timeout(1200),
]
CONFIG = """
scrape_configs:
  - job_name: ray
    scrape_interval: 1s
    static_configs: [{targets: ["127.0.0.1:%d"]}]
"""
# Nothing dies in this run.
WITHOUT_DATA = {'sum by (out_of_memory) (ray_selfrag_engine_deaths_total{run=~"$run"})'}


@contextmanager
def serving_prometheus(folder: Path, scraped: int) -> Iterator[str]:
    """A Prometheus on loopback that scrapes a port; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    (folder / "prometheus.yml").write_text(CONFIG % scraped)
    options = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    command = [str(SERVER), *options, f"--web.listen-address={address}"]
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_for(lambda: is_ready(address))
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(timeout=30)


def is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{address}/-/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def ask(address: str, expression: str, run: str) -> list[float]:
    """The finite values of the series that answer a query of the dashboard over the last ten minutes."""
    query = expression.replace("$__rate_interval", "30s").replace("$run", run)
    now = time.time()
    span = {"query": query, "start": now - 600, "end": now, "step": 5}
    with urllib.request.urlopen(f"{address}/api/v1/query_range?{urllib.parse.urlencode(span)}", timeout=30) as answer:
        found = json.load(answer)
    assert found["status"] == "success"
    values = [float(value) for series in found["data"]["result"] for _, value in series["values"]]
    return [value for value in values if math.isfinite(value)]


def test_every_panel_has_data(small_index: Path, demo_rows: list[dict], tmp_path: Path) -> None:
    rows = [{"id": row["id"], "query": row["query"], "filter": None} for row in demo_rows[:12]]
    rows += [{"id": "empty", "query": " ", "filter": None}, {**rows[0], "id": "nothing", "filter": "words > 10000"}]
    schema = pa.schema([(name, pa.string()) for name in ("id", "query", "filter")])
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "queries.parquet")
    output = tmp_path / "out"
    command = [sys.executable, "-m", "jobs.annotate", "--queries", str(tmp_path / "queries.parquet"), "--model", "demo"]
    with (
        cluster(tmp_path) as made,
        serving_prometheus(tmp_path, made.head_node.metrics_export_port) as prometheus,
    ):
        settings = [f"execution.ray_address={made.address}", "execution.unit_rows=4", "execution.max_error_rate=0.5"]
        settings += ["decoding.max_tokens=30", "execution.units_in_flight=1"]
        words = [word for setting in settings for word in ("--set", setting)]
        done = subprocess.run(
            [*command, "--index", str(small_index), "--output", str(output), *words],
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
            env=dict(os.environ),
        )
        assert done.returncode == 3, done.stderr[-3000:]
        run = encode_label(str(output))
        found = {
            target["expr"]: ask(prometheus, target["expr"], run)
            for panel in BOARD["panels"]
            for target in panel["targets"]
        }
        runs = BOARD["templating"]["list"][1]["query"]
        assert runs == "label_values(ray_selfrag_rows_total, run)"
        with urllib.request.urlopen(f"{prometheus}/api/v1/label/run/values", timeout=30) as answer:
            assert json.load(answer)["data"] == [run]
    assert {expression for expression, values in found.items() if not values} == WITHOUT_DATA
    # A rate would miss what a counter has when it first appears.
    assert found['sum (ray_selfrag_row_errors_total{run=~"$run"}) / sum (ray_selfrag_rows_total{run=~"$run"})'][-1] > 0
    empty = 'sum (ray_selfrag_empty_searches_total{run=~"$run"}) / sum (ray_selfrag_retrievals_total{run=~"$run"})'
    assert found[empty][-1] > 0
    assert max(found['sum(ray_selfrag_run_rows_written{run=~"$run"}) / sum(ray_selfrag_run_rows{run=~"$run"})']) <= 1
