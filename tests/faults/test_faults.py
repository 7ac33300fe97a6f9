"""A few of the campaign's runs, and faults that follow from the rows themselves."""

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.dataset as ds
import pytest
from pyarrow import fs

from tests.faults.campaign import model_folder
from tests.faults.harness import Job, broken, write_queries
from tests.faults.proxy import FaultProxy, Faults
from tests.faults.series import actor_kills, cluster, driver_kills, storage_faults


@dataclass(frozen=True)
class Running:
    """A cluster: its address, its folder of logs, one for process ids, and what passes for a model."""

    address: str
    session: Path
    pids: Path
    model: Path


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("faults")
    with cluster(folder) as made:
        session = Path(made.head_node.get_session_dir_path())
        yield Running(made.address, session, folder / "pids", model_folder(folder))


@pytest.fixture
def job(running: Running, tmp_path: Path) -> Job:
    settings = [f"execution.ray_address={running.address}"]
    return Job(str(tmp_path / "queries"), str(tmp_path / "out"), running.model, settings)


def test_no_rows_are_lost_or_duplicated_when_drivers_are_killed(job: Job, tmp_path: Path) -> None:
    write_queries(tmp_path / "queries", 150)
    killed, problems = driver_kills(job, tmp_path / "queries", random.Random(1), kills=2, longest=7.0)
    assert (killed, problems) == (2, [])


@pytest.mark.slow
def test_no_rows_are_lost_or_duplicated_when_actors_are_killed(job: Job, running: Running, tmp_path: Path) -> None:
    write_queries(tmp_path / "queries", 200)
    killed, problems = actor_kills(job, tmp_path / "queries", running.pids, random.Random(2), kills=3)
    assert killed >= 3
    assert problems == []


def test_poison_rows_become_error_rows_and_all_others_are_answered(job: Job, tmp_path: Path) -> None:
    words = {5: "RAISES", 17: "DIES", 33: "HANGS", 41: "ENGINE", 52: "MEMORY"}
    write_queries(tmp_path / "queries", 60, words)
    job.settings += ["execution.row_timeout_s=5", "execution.max_error_rate=0.1"]
    status, said = job.finish()
    assert status == 3, said[-3000:]
    assert broken(job.output, tmp_path / "queries", errors=5) == []
    errors = ds.dataset(f"{job.output}/errors").to_table().to_pylist()
    assert {row["id"]: (row["error_type"], row["attempts"]) for row in errors} == {
        "q5": ("KeyError", 1),
        "q17": ("ProcessDiedError", 2),
        "q33": ("TimeoutError", 1),
        "q41": ("ProcessDiedError", 2),
        "q52": ("OutOfMemoryError", 2),
    }


@pytest.mark.slow
def test_process_killed_during_actor_start_is_restarted(job: Job, tmp_path: Path) -> None:
    write_queries(tmp_path / "queries", 30)
    job.model = model_folder(tmp_path)
    (job.model / "dies_at_start").write_text("2")
    status, said = job.finish()
    assert (job.model / "dies_at_start").read_text() == "0"
    assert job.problems(tmp_path / "queries", status, said) == []


@pytest.mark.slow
def test_run_whose_actors_never_start_ends_with_the_cause(job: Job, tmp_path: Path) -> None:
    write_queries(tmp_path / "queries", 30)
    job.model = model_folder(tmp_path)
    (job.model / "dies_at_start").write_text("1000")
    job.settings += ["execution.units_in_flight=1"]
    status, said = job.finish()
    assert status == 1
    (line,) = (line for line in said.splitlines() if line.startswith("error: "))
    assert "11 consecutive attempts crashed without progress" in line
    assert (job.model / "dies_at_start").read_text() == str(1000 - 11)


@pytest.mark.slow
def test_answers_are_the_same_after_a_driver_kill(job: Job, tmp_path: Path) -> None:
    write_queries(tmp_path / "queries", 60)
    assert job.finish()[0] == 0
    calm = {row["id"]: row["answer"] for row in ds.dataset(f"{job.output}/data").to_table().to_pylist()}
    job.output = str(tmp_path / "again")
    driver_kills(job, tmp_path / "queries", random.Random(3), kills=1, longest=6.0)
    found = ds.dataset(f"{job.output}-0/data").to_table().to_pylist()
    assert {row["id"]: row["answer"] for row in found} == calm


def test_second_run_on_one_output_stops_with_one_line(job: Job, tmp_path: Path) -> None:
    write_queries(tmp_path / "queries", 300)
    first, second = job.start(), job.start()
    ended = [first.ended(), second.ended()]
    statuses, said = [status for status, _ in ended], [text for _, text in ended]
    assert sorted(statuses) == [0, 2], said
    assert "another run is using this output (process" in said[statuses.index(2)].strip().splitlines()[-1]
    assert broken(job.output, tmp_path / "queries") == []


@pytest.mark.slow
def test_transient_store_faults_are_retried(job: Job, s3, tmp_path: Path) -> None:
    write_queries(tmp_path / "queries", 100)
    hurt, problems = storage_faults(job, tmp_path / "queries", s3, random.Random(4), runs=1)
    assert hurt > 5
    assert problems == []


@pytest.mark.slow
def test_store_outage_ends_the_run_and_the_same_command_resumes(job: Job, s3, tmp_path: Path) -> None:
    write_queries(tmp_path / "queries", 200)
    job.output, job.filesystem = f"s3://{s3.bucket}/gone/out", s3.filesystem()
    faults = Faults()
    with FaultProxy(s3.endpoint, faults, seed=6) as proxy:
        at = {"endpoint_url": proxy.url, "access_key": s3.access_key, "secret_key": s3.secret_key, "patience_s": 3}
        job.settings += [f"storage.{name}={value}" for name, value in {**at, "region": "us-east-1"}.items()]
        started = job.start()
        found = fs.FileSelector(f"{s3.bucket}/gone/out/data", allow_not_found=True)
        while len(job.filesystem.get_file_info(found)) < 2:
            assert started.process.poll() is None, started.ended()
            time.sleep(0.1)
        faults.refused = 1.0
        status, said = started.ended()
        assert status == 1
        (line,) = (line for line in said.splitlines() if line.startswith("error: "))  # workers may speak after it
        assert f"s3://{s3.bucket}/gone/out" in line
        faults.refused = 0.0
        status, said = job.finish()
        assert status == 0, said[-5000:]
        assert job.problems(tmp_path / "queries", status, said) == []


def test_unreachable_store_ends_the_run_with_its_uri(job: Job, s3, tmp_path: Path) -> None:
    write_queries(tmp_path / "queries", 20)
    job.output = f"s3://{s3.bucket}/away/out"
    with FaultProxy(s3.endpoint, Faults(refused=1.0), seed=5) as proxy:
        keys = {"endpoint_url": proxy.url, "access_key": s3.access_key, "secret_key": s3.secret_key}
        job.settings += [f"storage.{name}={value}" for name, value in {**keys, "region": "us-east-1"}.items()]
        job.settings += ["storage.patience_s=3"]
        status, said = job.finish()
    assert status == 2
    assert said.strip().splitlines()[-1].startswith(f"error: s3://{s3.bucket}/away/out")
    assert s3.secret_key not in said


def test_credentials_never_appear_in_files_or_logs(job: Job, running: Running, s3, tmp_path: Path) -> None:
    """Neither by a run with an error row, nor by one that the store refuses, into files or logs, Ray's included."""
    write_queries(tmp_path / "queries", 30, {7: "RAISES"})
    keys = f"access_key: {s3.access_key}\n  secret_key: {s3.secret_key}\n  endpoint_url: {s3.endpoint}"
    (tmp_path / "run.yaml").write_text(f"storage:\n  {keys}\n  region: us-east-1\n")
    job.queries = str(tmp_path / "queries")
    said = []
    for output, status in ((f"s3://{s3.bucket}/secrets/out", 3), ("s3://elsewhere/out", 2)):
        job.output = output
        job.options = ["--config", str(tmp_path / "run.yaml"), "--set", "execution.max_error_rate=0.5"]
        ended, words = job.finish()
        assert ended == status, words[-2000:]
        said.append(words.encode())
    store = s3.filesystem()
    files = store.get_file_info(fs.FileSelector(f"{s3.bucket}/secrets", recursive=True))
    written = [store.open_input_stream(file.path).read() for file in files if file.type == fs.FileType.File]
    assert len(written) > 4  # data, errors, manifest, success
    logs = [file.read_bytes() for file in (running.session / "logs").rglob("*") if file.is_file()]
    assert len(logs) > 10
    for text in [*said, *written, *logs]:
        assert s3.secret_key.encode() not in text
        assert s3.access_key.encode() not in text
