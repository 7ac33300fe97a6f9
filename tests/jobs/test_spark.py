"""An annotated set, read by a real Spark, which has nested types and rules for names of its own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.runs import ScriptedRun, write_queries
from tests.support.uvx import UVX

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(UVX is None, reason="uv is not installed, which fetches Spark"),
    pytest.mark.skipif(shutil.which("java") is None, reason="no Java is installed (Debian: default-jre-headless)"),
    pytest.mark.timeout(600),
]

READ = """
import json, sys
from pyspark.sql import SparkSession

local = {"spark.ui.enabled": "false", "spark.driver.host": "127.0.0.1", "spark.driver.bindAddress": "127.0.0.1"}
builder = SparkSession.builder.master("local[1]")
for key, value in local.items():
    builder = builder.config(key, value)
spark = builder.getOrCreate()
data, copy = sys.argv[1:]
rows = spark.read.parquet(data)
nested = rows.selectExpr("usage.prompt_tokens", "segments[0].score", "passages[0].metadata", "searches[0].digest")
rows.write.parquet(copy)
print(json.dumps({
    "answers": {row.id: row.answer for row in rows.select("id", "answer").collect()},
    "tokens": [row.prompt_tokens for row in nested.collect()],
    "same": spark.read.parquet(copy).schema == rows.schema,
}))
"""


def test_spark_reads_and_writes_a_set(tmp_path: Path, demo_model: Path) -> None:
    write_queries(tmp_path / "queries" / "a.parquet", a1="one", a2="bad", a3="three", a4="four")
    run = ScriptedRun(tmp_path / "queries", tmp_path / "out", demo_model)
    assert run.annotate().exit_code == 3
    python = [str(UVX), "--python", sys.executable, "--from", "pyspark", "python"]
    words = ["-c", READ, str(run.output / "data"), str(tmp_path / "copy")]
    environment = {**os.environ, "SPARK_LOCAL_IP": "127.0.0.1"}
    done = subprocess.run([*python, *words], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {"answers": {"a1": "ONE", "a3": "THREE", "a4": "FOUR"}, "tokens": [10, 10, 10], "same": True}
