"""Runs whose engines hang or whose machines vanish: the rows are not to blame."""

import os
import random
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pytest

from tests.faults.campaign import model_folder
from tests.faults.harness import Job, Running, broken, processes, wait_for, write_queries
from tests.faults.series import cluster, hangs, on


@pytest.fixture(scope="module")
def pids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the actors' process ids."""
    return tmp_path_factory.mktemp("blame") / "pids"


@pytest.fixture(scope="module")
def made(pids: Path) -> Iterator[Any]:
    with cluster(pids.parent) as made:
        yield made


@pytest.fixture
def job(made: Any, tmp_path: Path) -> Job:
    return on(made, Job(str(tmp_path / "queries"), str(tmp_path / "out"), model_folder(tmp_path)))


def list_errors(job: Job) -> dict[str, tuple[str, str]]:
    """Type and message of each error row, by id."""
    rows = ds.dataset(f"{job.output}/errors").to_table().to_pylist()
    return {row["id"]: (row["error_type"], row["error_message"]) for row in rows}


@pytest.mark.parametrize("counter", ["stalls", "stalls_at_start"])
def test_engine_that_hangs_is_replaced_and_no_row_is_blamed(job: Job, tmp_path: Path, counter: str) -> None:
    write_queries(tmp_path / "queries", 60, {17: "STALLS"} if counter == "stalls" else None)
    (job.model / counter).write_text("2")
    job.settings += ["execution.engine_stall_s=1"]
    status, said = job.finish()
    assert job.problems(tmp_path / "queries", status, said) == []
    assert (job.model / counter).read_text() == "0"
    assert "no step for 1 s with" in said


@pytest.mark.slow
def test_rows_that_time_out_because_the_engine_hangs_are_not_blamed(job: Job, tmp_path: Path) -> None:
    write_queries(tmp_path / "queries", 31, {4: "STALLS", 30: "STALLS"})  # in a full unit, and alone in the last one
    (job.model / "stalls").write_text("3")
    job.settings += ["execution.row_timeout_s=4"]
    status, said = job.finish()
    assert job.problems(tmp_path / "queries", status, said) == []
    assert (job.model / "stalls").read_text() == "0"


@pytest.mark.slow
def test_row_that_hangs_every_engine_is_isolated(job: Job, tmp_path: Path) -> None:
    write_queries(tmp_path / "queries", 30, {17: "STALLS"})
    job.settings += ["execution.engine_stall_s=1", "execution.max_error_rate=0.1"]
    status, said = job.finish()
    assert status == 3, said[-3000:]
    assert broken(job.output, tmp_path / "queries", errors=1) == []
    kind, message = list_errors(job)["q17"]
    assert kind == "ProcessDiedError"
    assert re.fullmatch(
        r"2 processes died while decoding only this row; last engine failure: "
        r"no step for 1 s with \d+ request\(s\) in flight",
        message,
    )


@pytest.mark.slow
def test_engines_that_hang_again_and_again_end_the_run_with_the_cause(job: Job, tmp_path: Path) -> None:
    write_queries(tmp_path / "queries", 30)
    (job.model / "stalls_at_start").write_text("1000")
    job.settings += ["execution.units_in_flight=1", "execution.engine_stall_s=0.5"]
    status, said = job.finish()
    assert status == 1
    (line,) = (line for line in said.splitlines() if line.startswith("error: "))
    assert re.search(
        "1[12] consecutive attempts crashed without progress; last engine failure: no step for 0.5 s", line
    )


def replace_nodes(running: Running, made: Any, nodes: Path, timeout: float) -> tuple[int, str]:
    """Bring a new machine for each that a run has lost, until the run ends."""
    left, until = int(nodes.read_text()), time.monotonic() + timeout
    while running.process.poll() is None and time.monotonic() < until:
        if (now := int(nodes.read_text() or left)) < left:
            made.add_node(num_cpus=1)
            left = now
        time.sleep(0.2)
    return running.ended(1)


@pytest.mark.slow
def test_row_in_flight_on_machines_that_vanish_is_answered_in_the_end(tmp_path: Path) -> None:
    """Seven machines are reclaimed under the same row: more than a row may kill processes."""
    write_queries(tmp_path / "queries", 30, {1: "NODE"})
    model = model_folder(tmp_path)
    (model / "nodes").write_text("7")
    job = Job(str(tmp_path / "queries"), str(tmp_path / "out"), model, ["execution.units_in_flight=1"])
    with cluster(tmp_path, cpus=0, nodes=1) as made:
        status, said = replace_nodes(on(made, job).start(), made, model / "nodes", 540)
    assert job.problems(tmp_path / "queries", status, said) == []
    assert (model / "nodes").read_text() == "0"


@pytest.mark.slow
def test_no_rows_are_lost_duplicated_or_blamed_in_a_series_of_hangs(job: Job, tmp_path: Path) -> None:
    write_queries(tmp_path / "queries", 100)
    hung, problems = hangs(job, tmp_path / "queries", random.Random(5), 3)
    assert hung >= 3
    assert problems == []


@pytest.mark.parametrize("victim", ["driver", "actor"])
def test_rows_that_had_finished_when_their_unit_was_lost_are_kept(
    job: Job, pids: Path, tmp_path: Path, victim: str
) -> None:
    write_queries(tmp_path / "queries", 10, {7: "WAITS"})
    (tmp_path / "waits").touch()
    (job.model / "keep_s").write_text("0")
    partial = Path(job.output) / "_partial"
    running = job.start()
    wait_for(lambda: len(list(partial.glob("*.parquet"))) == 9)
    kept = ds.dataset(partial).to_table(columns=["row", "usage"]).to_pylist()
    if victim == "driver":
        running.kill()
    else:
        os.kill(max(processes(pids)), signal.SIGKILL)
    (tmp_path / "waits").unlink()
    status, said = job.finish() if victim == "driver" else running.ended()
    assert job.problems(tmp_path / "queries", status, said) == []
    assert not partial.exists()
    found = {row["id"]: row["usage"] for row in ds.dataset(f"{job.output}/data").to_table().to_pylist()}
    assert {f"q{row['row']}": row["usage"] for row in kept} == {name: found[name] for name in found if name != "q7"}
