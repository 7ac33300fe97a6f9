"""The night after an update of the index, with the real engine: only what the update concerns is answered again."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.indexing.update import UpdateRequest, run_update

pytestmark = pytest.mark.slow

ROWS = 8


def annotate(*options: str | Path) -> subprocess.CompletedProcess[str]:
    settings = ["execution.unit_rows=4", "decoding.max_tokens=20", "decoding.mode=always", "decoding.passages=2"]
    words = [word for setting in settings for word in ("--set", setting)]
    command = [sys.executable, "-m", "jobs.annotate", "--model", "demo", "--json", *map(str, options), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=570, check=False, env={**os.environ})


def read(output: Path) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in pq.read_table(output / "data").to_pylist()}


def test_updated_index_costs_what_it_changes(
    demo_rows: list[dict[str, Any]], small_index: Path, tmp_path: Path
) -> None:
    index, first, second = shutil.copytree(small_index, tmp_path / "index"), tmp_path / "first", tmp_path / "second"
    queries = pa.table({name: [row[name] for row in demo_rows[:ROWS]] for name in ("id", "query", "answers")})
    pq.write_table(queries, tmp_path / "queries.parquet")
    options: list[str | Path] = ["--queries", tmp_path / "queries.parquet", "--index", index]
    assert annotate(*options, "--output", first).returncode == 0
    before = read(first)
    gone = before[demo_rows[0]["id"]]["passages"][0]["id"]
    pq.write_table(pa.table({"id": [gone]}), tmp_path / "gone.parquet")
    run_update(UpdateRequest(str(index), remove=str(tmp_path / "gone.parquet")))

    result = annotate(*options, "--output", second, "--stale", first)
    assert result.returncode == 0, result.stderr[-3000:]
    after, summary = read(second), json.loads(result.stdout)
    again = {name for name, row in after.items() if row["carried_from"] is None}
    assert 1 <= len(again) < ROWS
    assert summary["carried"] == ROWS - len(again)
    assert f"{ROWS - len(again)} carried over" in result.stderr
    for name, row in after.items():
        assert gone not in [passage["id"] for passage in row["passages"]]
        same = ("answer", "segments", "passages")
        assert name in again or {key: row[key] for key in same} == {key: before[name][key] for key in same}
        assert (row["usage"]["generated_tokens"] > 0) == (name in again)
    changed = sum(row["answer"] != before[name]["answer"] for name, row in after.items())
    page = (second / "report.html").read_text()
    assert f"{changed} of {ROWS} answers changed" in page
    assert ("Some answers that changed" in page) == (changed > 0)
    stale = json.loads((second / "_manifest.json").read_text())["stale"]
    assert {row["carried_from"] for row in after.values()} == {None, stale["run"]}

    verified = subprocess.run(
        [sys.executable, "-m", "jobs.verify", "--annotations", str(second)], capture_output=True, text=True, check=False
    )
    assert verified.returncode == 0, verified.stderr

    resumed = annotate(*options, "--output", first)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "has been updated since the output was begun, which goes on with the earlier version" in resumed.stderr
    assert "is already complete; nothing to do" in resumed.stderr
