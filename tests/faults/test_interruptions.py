"""Whole commands that SIGINT or SIGTERM interrupts, with a Ray instance of their own, and the same commands again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from tests.faults.campaign import model_folder
from tests.faults.harness import Job, Running, wait_for, write_queries
from tests.support.building import given_vectors

# Names the processes that a command has started, by its value in their environments.
MARK = "SELFRAG_TEST_INTERRUPTION"
# Seconds in which an interrupted command and all its processes end, on a busy machine.
PATIENCE_S = 40.0


@pytest.fixture
def job(tmp_path: Path) -> Job:
    write_queries(tmp_path / "queries", 60, {40: "HANGS"})
    environment = {MARK: str(tmp_path), "FAULTS_PIDS": str(tmp_path / "pids")}
    (tmp_path / "pids").mkdir()
    places, settings = (str(tmp_path / "queries"), str(tmp_path / "out")), ["execution.grace_s=1"]
    return Job(*places, model_folder(tmp_path), settings, [], environment)


def list_marked(mark: str) -> list[int]:
    """List the processes of a command that are alive, but not those that have ended and await their parent."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def interrupt(running: Running, number: signal.Signals, mark: str) -> tuple[int, str]:
    """Interrupt a command; return its status and its own last line once all its processes have ended."""
    running.process.send_signal(number)
    status, said = running.ended(PATIENCE_S)
    wait_for(lambda: not list_marked(mark), PATIENCE_S)
    # What Ray forwards of other processes, such as that an actor could not be killed, may come later.
    return status, [line for line in said.splitlines() if "(pid=" not in line][-1]


@pytest.mark.parametrize(
    ("number", "expected"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 143)]
)
def test_interrupted_run_leaves_nothing_behind_and_can_be_continued(
    job: Job, tmp_path: Path, number: signal.Signals, expected: int
) -> None:
    """After SIGTERM, the other rows of the unit in flight are kept."""
    running = job.start()
    wait_for(lambda: len(list((tmp_path / "out").glob("data/*.parquet"))) == 5)
    time.sleep(1)
    status, line = interrupt(running, number, str(tmp_path))
    assert (status, line) == (expected, "interrupted; the same command continues it")
    assert not (tmp_path / "out" / "_running").exists()
    assert len(list((tmp_path / "pids").iterdir())) == 1  # no further job began
    kept = [pq.read_metadata(file).num_rows for file in (tmp_path / "out").glob("_partial/*.parquet")]
    assert sum(kept) == (9 if number == signal.SIGTERM else 0)
    job.settings += ["execution.row_timeout_s=1", "execution.max_error_rate=0.1"]
    status, said = job.finish()
    assert status == 3, said
    assert "59 of 60 rows answered" in said


@pytest.mark.slow
def test_run_whose_ray_receives_the_signal_too_is_interrupted(job: Job, tmp_path: Path) -> None:
    """As from timeout(1), which sends it to the whole group of processes."""
    running = job.start()
    wait_for(lambda: len(list((tmp_path / "out").glob("data/*.parquet"))) == 5)
    os.killpg(running.process.pid, signal.SIGTERM)
    status, said = running.ended(PATIENCE_S)
    assert (status, said.splitlines()[-1]) == (143, "interrupted; the same command continues it")
    assert not (tmp_path / "out" / "_running").exists()


@pytest.mark.slow
def test_run_that_has_lost_its_lease_writes_nothing_more(job: Job, tmp_path: Path) -> None:
    """The unit in flight could end after 20 seconds, in the grace of an interruption; the loss is noticed after 15."""
    job.settings += ["execution.row_timeout_s=20", "execution.max_error_rate=1", "execution.grace_s=30"]
    running = job.start()
    wait_for(lambda: len(list((tmp_path / "out").glob("data/*.parquet"))) == 5)
    (lease,) = (tmp_path / "out" / "_running").glob("*.json")
    lease.unlink()
    status, said = running.ended(PATIENCE_S)
    assert status in (1, 143)
    assert "another run has taken over" in said
    assert len(list((tmp_path / "out").glob("data/*.parquet"))) == 5


def test_run_is_interrupted_before_its_first_row(job: Job, tmp_path: Path) -> None:
    running = job.start()
    (job.model / "actors").write_text("2")  # rows wait for a second actor, and there is only one
    wait_for(lambda: list((tmp_path / "pids").iterdir()))
    assert interrupt(running, signal.SIGTERM, str(tmp_path)) == (143, "interrupted; the same command continues it")
    assert not (tmp_path / "out" / "_running").exists()


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.0, 1.0, 2.0])
def test_run_is_interrupted_while_ray_starts(job: Job, tmp_path: Path, seconds: float) -> None:
    running = job.start()
    wait_for(lambda: len(list_marked(str(tmp_path))) > 1)  # Ray's first process
    time.sleep(seconds)
    status, line = interrupt(running, signal.SIGTERM, str(tmp_path))
    assert (status, line.partition(";")[0]) == (143, "interrupted")
    assert not (tmp_path / "out" / "_running").exists()


@pytest.mark.slow
def test_interrupted_build_can_be_continued(tmp_path: Path) -> None:
    pq.write_table(given_vectors(200)[0], tmp_path / "passages.parquet")
    options = ["--passages", f"{tmp_path}/passages.parquet", "--output", f"{tmp_path}/index", "--embeddings", "vector"]
    command = [sys.executable, "-m", "jobs.build_index", *options]
    with (tmp_path / "log").open("w+") as log:
        process = subprocess.Popen(command, stderr=log, env={**os.environ, MARK: str(tmp_path)})
        running = Running(process, log)
        wait_for(lambda: "starting 1 actor(s)" in (tmp_path / "log").read_text())
        status, line = interrupt(running, signal.SIGTERM, str(tmp_path))
    assert (status, line) == (143, "interrupted; the same command continues it")
    assert not (tmp_path / "index" / "_running").exists()
    assert subprocess.run(command, check=False).returncode == 0
    assert (tmp_path / "index" / "index.json").exists()
