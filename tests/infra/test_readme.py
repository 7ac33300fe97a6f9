"""The commands of the README and of the documents that continue it, run in their order on a few of the demo's rows.

Runs after the first one are dry ones, since the engine would take a minute each time.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from jobs.cli import load_command
from jobs.demo import DEMO
from tests.infra.test_docs import ROOT, words_of
from tests.support.s3 import serving_s3

# In the order in which a reader follows them: later commands use what earlier ones made.
DOCUMENTS = [ROOT / name for name in ("README.md", "infra/DATA.md", "infra/CLUSTER.md")]
# What is not at hand where tests run: models and data sets of the hub, and a cluster (test_submit.py has one).
ELSEWHERE = ("--dataset", "hf:", "BAAI/", "selfrag/", "execution.ray_address=auto")
# What a run needs beside its command: candidates for sweeps; a dry run where the engine would be started once more.
KEPT = ["--set", "decoding.keep_candidates=true", "--set", "decoding.explore=true", "--set", "decoding.max_tokens=20"]
DRY = ["--model", "demo", "--set", "execution={actors: 1, cpus_per_actor: 1, gpus_per_actor: 0}", "--dry-run"]


def blocks() -> list[str]:
    texts = [document.read_text() for document in DOCUMENTS]
    return [block for text in texts for block in re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)]


def commands() -> list[tuple[str, list[str]]]:
    """Job and words of each command, optional ones left out."""
    lines = [line for block in blocks() for line in re.sub(r"\\\n|\[.*?\]", "", block).splitlines()]
    found = [re.search(r"python -m jobs\.([\w.]+)(.*)", line) for line in lines if "ray job" not in line]
    return [(match[1], list(words_of(match[2]))) for match in found if match]


def runs(words: list[str]) -> bool:
    return not any(word.startswith(ELSEWHERE) for word in words)


def prepare(folder: Path) -> None:
    """Write the files that the commands read."""
    pq.write_table(pq.read_table(DEMO / "passages.parquet").slice(0, 60), folder / "passages.parquet")
    questions = pq.read_table(DEMO / "queries.parquet").slice(0, 12)
    pq.write_table(questions, folder / "queries.parquet")
    lines = [{"id": n, "question": "Who?", "gold": {"aliases": ["x"]}} for n in range(3)]
    (folder / "questions.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    for block in blocks():
        if named := re.match(r"# (\w+\.yaml): ", block):
            (folder / named[1]).write_text(block)


def call(job: str, words: list[str]) -> tuple[int, str]:
    """Exit status and output of a command; those that start processes have one of their own."""
    if job in ("annotate", "build_index", "rescore"):
        line = [sys.executable, "-m", f"jobs.{job}", *words]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=500, env=environment)
        return done.returncode, done.stdout + done.stderr
    result = CliRunner().invoke(load_command(job), words)
    return result.exit_code, result.output


def test_most_commands_are_run() -> None:
    found = commands()
    assert len(found) > 18
    elsewhere = ["build_index", "annotate", "import_queries", "import_queries", "annotate"]
    assert [job for job, words in found if not runs(words)] == elsewhere


@pytest.mark.slow
def test_documented_commands_succeed_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(tmp_path)
    bucket = tmp_path / "store" / "bucket"
    bucket.parent.mkdir()
    with contextlib.chdir(tmp_path), serving_s3(bucket.parent) as server:
        (bucket / "queries").mkdir()
        shutil.copy("queries.parquet", bucket / "queries")
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        for job, words in filter(lambda command: runs(command[1]), commands()):
            more: list[str] = []
            if job == "annotate":
                more = DRY if Path("annotated").exists() else KEPT
            if "s3://bucket/index/" in words and job == "build_index":
                shutil.rmtree(bucket / "index")
            status, output = call(job, [*words, *more])
            assert status == 0, f"jobs.{job} {shlex.join(words)}: {output[-2000:]}"
            if more == KEPT:  # later commands use these
                shutil.copytree("annotated", "last_week")
                shutil.copytree("index", bucket / "index")
        rows = pa.concat_tables(pq.read_table(file) for file in Path("annotated/data").glob("*.parquet"))
        assert sorted(rows["id"].to_pylist()) == sorted(pq.read_table("queries.parquet")["id"].to_pylist())
        assert Path("rescored/_SUCCESS").exists()
        assert Path("annotated/report.html").stat().st_size > 10_000
        assert pq.read_table("queries/").num_rows == pq.read_table("imported/").num_rows == 3
