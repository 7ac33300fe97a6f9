import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline.config.sections import StorageConfig
from pipeline.storage.lease import Lease, OutputInUseError, read_process_start
from pipeline.storage.location import Location, locate
from tests.support.leases import leave_lease
from tests.support.s3 import S3Server


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.storage.lease.SETTLE_S", 0.3)


@pytest.fixture
def output(tmp_path: Path) -> Location:
    return locate(str(tmp_path / "out"), StorageConfig())


def claims(output: Location) -> list[dict]:
    return [json.loads(file.read_text()) for file in Path(output.path).glob("_running/*.json")]


def test_a_claim_lasts_as_long_as_its_run(output: Location) -> None:
    with Lease(output):
        (claim,) = claims(output)
        assert claim["pid"] == os.getpid()
    assert list(Path(output.path).iterdir()) == []


def test_runs_follow_one_another_in_object_storage(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    output = locate("s3://bucket/claimed/", StorageConfig(patience_s=2))
    for _ in range(3):
        with Lease(output), pytest.raises(OutputInUseError):
            Lease(output).__enter__()


def test_a_second_run_on_the_same_machine_stops_with_a_clear_line(output: Location) -> None:
    with Lease(output):
        with pytest.raises(OutputInUseError, match=rf"another run is using this output \(process {os.getpid()} on "):
            Lease(output).__enter__()
        assert len(claims(output)) == 1
    with Lease(output):
        assert len(claims(output)) == 1


def test_a_claim_that_this_process_has_given_back_is_dead_though_the_store_still_shows_it(output: Location) -> None:
    with Lease(output):
        (shown,) = Path(output.path).glob("_running/*.json")
        content = shown.read_bytes()
    shown.parent.mkdir(parents=True)
    shown.write_bytes(content)
    with Lease(output):
        assert not shown.exists()


def test_a_killed_runs_claim_does_not_stand_in_the_way(output: Location) -> None:
    script = f"""
import time
from pipeline.storage.lease import Lease
from pipeline.config.run import StorageConfig
from pipeline.storage.location import locate
with Lease(locate({output.path!r}, StorageConfig())):
    print("claimed", flush=True)
    time.sleep(60)
"""
    run = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    assert run.stdout.readline() == "claimed\n"
    with pytest.raises(OutputInUseError, match=f"process {run.pid} on"):
        Lease(output).__enter__()
    run.send_signal(signal.SIGKILL)
    run.wait()
    with Lease(output):
        assert [claim["pid"] for claim in claims(output)] == [os.getpid()]


def test_a_reused_pid_is_another_process(output: Location) -> None:
    file = leave_lease(Path(output.path), born="1")
    with Lease(output):
        assert not file.exists()


def test_another_machines_silent_claim_is_dead_after_a_while(
    output: Location, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pipeline.storage.lease.EXPIRY_S", 0.3)
    file = leave_lease(Path(output.path), host="elsewhere")
    with Lease(output):
        assert not file.exists()
    assert "a run on elsewhere holds a lease; waiting" in caplog.text


def test_another_machines_living_claim_is_respected(output: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.storage.lease.EXPIRY_S", 5.0)
    monkeypatch.setattr("pipeline.storage.lease.HEARTBEAT_S", 0.3)
    file = leave_lease(Path(output.path), host="elsewhere")
    beat = threading.Timer(0.2, lambda: leave_lease(Path(output.path), host="elsewhere", beats=1))
    beat.start()
    began = time.monotonic()
    with pytest.raises(OutputInUseError, match="on elsewhere"):
        Lease(output).__enter__()
    assert time.monotonic() - began < 3
    assert file.exists()


def test_signs_of_life_are_written(output: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.storage.lease.HEARTBEAT_S", 0.05)
    with Lease(output):
        time.sleep(0.4)
        (claim,) = claims(output)
    assert claim["beats"] >= 2


def _race(path: str, start: object, results: object) -> None:
    output = locate(path, StorageConfig())
    start.wait()  # type: ignore[attr-defined]
    try:
        with Lease(output):
            results.put("won")  # type: ignore[attr-defined]
            time.sleep(1.5)
    except OutputInUseError:
        results.put("stopped")  # type: ignore[attr-defined]


def test_of_several_runs_started_at_once_one_goes_on(output: Location) -> None:
    context = multiprocessing.get_context("fork")
    start, results = context.Event(), context.Queue()
    runs = [context.Process(target=_race, args=(output.path, start, results)) for _ in range(4)]
    for run in runs:
        run.start()
    start.set()
    assert sorted(results.get(timeout=20) for _ in runs) == ["stopped", "stopped", "stopped", "won"]
    for run in runs:
        run.join(10)
    assert claims(output) == []


def test_no_process_has_no_birth() -> None:
    assert read_process_start(os.getpid())
    assert read_process_start(2**22 + 1) is None
