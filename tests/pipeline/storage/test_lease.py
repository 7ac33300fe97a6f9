import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.config.sections import StorageConfig
from pipeline.storage import lease as lease_module
from pipeline.storage.lease import Lease, LeaseLostError, OutputInUseError, read_process_start
from pipeline.storage.location import HIDDEN_S, Location, locate
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


def test_lease_lasts_as_long_as_its_run(output: Location) -> None:
    with Lease(output):
        (claim,) = claims(output)
        assert claim["pid"] == os.getpid()
    assert list(Path(output.path).iterdir()) == []


def test_object_storage_lease_is_exclusive_and_reusable(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    output = locate("s3://bucket/claimed/", StorageConfig(patience_s=2))
    for _ in range(3):
        with Lease(output), pytest.raises(OutputInUseError):
            Lease(output).__enter__()


def test_lease_on_object_storage_is_released_after_a_file_was_deleted(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    output = locate("s3://bucket/imported", StorageConfig())
    with Lease(output):
        for name in ("unfinished", "part-0"):
            (output / name).write(b"x")
        (output / "unfinished").delete()
    time.sleep(HIDDEN_S)
    assert [file.name for file in (output / "_running").list_files()] == ["README"]


def test_second_run_on_the_same_machine_is_refused(output: Location) -> None:
    with Lease(output):
        with pytest.raises(OutputInUseError, match=rf"another run is using this output \(process {os.getpid()} on "):
            Lease(output).__enter__()
        assert len(claims(output)) == 1
    with Lease(output):
        assert len(claims(output)) == 1


def test_released_lease_of_this_process_is_ignored_if_still_listed(output: Location) -> None:
    with Lease(output):
        (shown,) = Path(output.path).glob("_running/*.json")
        content = shown.read_bytes()
    shown.parent.mkdir(parents=True)
    shown.write_bytes(content)
    with Lease(output):
        assert not shown.exists()


def test_lease_of_a_killed_run_is_ignored(output: Location) -> None:
    script = f"""
import time
from pipeline.storage.lease import Lease
from pipeline.config.run import StorageConfig
from pipeline.storage.location import HIDDEN_S, locate
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


def test_lease_of_a_reused_pid_is_ignored(output: Location) -> None:
    file = leave_lease(Path(output.path), born="1")
    with Lease(output):
        assert not file.exists()


def test_lease_of_another_machine_without_heartbeat_expires(
    output: Location, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pipeline.storage.lease.EXPIRY_S", 0.3)
    file = leave_lease(Path(output.path), host="elsewhere")
    with Lease(output):
        assert not file.exists()
    assert "a run on elsewhere holds a lease; waiting" in caplog.text


def test_lease_of_another_machine_with_heartbeat_is_respected(
    output: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_heartbeats_are_written(output: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.storage.lease.HEARTBEAT_S", 0.05)
    with Lease(output):
        time.sleep(0.4)
        (claim,) = claims(output)
    assert claim["beats"] >= 2


def take_over(output: Location, **changes: object) -> None:
    """Do what a run does that found no heartbeat: write another lease, and delete this one."""
    for file in Path(output.path).glob("_running/*.json"):
        file.unlink()
    leave_lease(Path(output.path), id="f" * 32, host="elsewhere", **changes)


def replace_own(output: Location) -> None:
    (file,) = Path(output.path).glob("_running/*.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "pid": 1}))


def run_beside(output: Location) -> None:
    leave_lease(Path(output.path), id="f" * 32, host="elsewhere", started=1.0, beats=1)


@pytest.mark.parametrize(
    ("happens", "reason"),
    [
        (take_over, "its lease was deleted or replaced"),
        (replace_own, "its lease was deleted or replaced"),
        (run_beside, r"process \d+ on elsewhere holds one too"),
    ],
)
def test_run_ends_when_a_heartbeat_finds_its_lease_lost(
    happens: Callable[[Location], None], reason: str, output: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.storage.lease.HEARTBEAT_S", 0.2)
    began, renewed = time.monotonic(), []
    with pytest.raises(LeaseLostError, match=reason), interruptible(), Lease(output) as lease:  # noqa: PT012
        lease.on_renewal = lambda: renewed.append(1)
        while not renewed:
            time.sleep(0.01)
        happens(output)
        time.sleep(20)
    assert time.monotonic() - began < 10
    assert len(renewed) < 4


@contextmanager
def interruptible() -> Iterator[None]:
    """Handle SIGTERM as a command does, whatever this process did before."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def test_newcomer_that_gives_way_does_not_end_the_run(output: Location) -> None:
    with Lease(output) as lease:
        newcomer = leave_lease(Path(output.path), id="f" * 32, host="elsewhere", started=1.0, beats=0)
        lease.renew()
        newcomer.unlink()


def test_younger_run_does_not_end_the_run(output: Location) -> None:
    with Lease(output) as lease:
        younger = leave_lease(Path(output.path), id="f" * 32, host="elsewhere", started=time.time() + 600, beats=3)
        lease.renew()
        younger.unlink()


def test_late_run_ends_if_another_one_has_begun(output: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.storage.lease.HEARTBEAT_S", 60)
    with Lease(output) as lease:
        late = lease_module.read_clock() + lease_module.EXPIRY_S + 1
        monkeypatch.setattr("pipeline.storage.lease.read_clock", lambda: late)
        newcomer = leave_lease(Path(output.path), id="f" * 32, host="elsewhere", started=time.time() + 600)
        with pytest.raises(LeaseLostError, match="holds one too"):
            lease.renew()
        newcomer.unlink()
        lease.renew()  # nobody else has come: a store was out, for all


def test_run_that_was_only_slow_is_not_replaced(output: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.storage.lease.EXPIRY_S", 0.3)
    leave_lease(Path(output.path), host="elsewhere")
    write = Lease._write

    def write_while_the_other_wakes(lease: Lease) -> None:
        write(lease)
        leave_lease(Path(output.path), host="elsewhere", beats=1)

    monkeypatch.setattr(Lease, "_write", write_while_the_other_wakes)
    with pytest.raises(OutputInUseError, match="on elsewhere"):
        Lease(output).__enter__()
    assert [claim["host"] for claim in claims(output)] == ["elsewhere"]


DAMAGED = ["", "{", "[]", "null", '"x"', "{}", '{"id": 1}', "\x00\xff", "PAR1"]
NEWER = '{"id": "0", "host": "h", "pid": 1, "born": "1", "started": 1.0, "beats": 0, "term": 7}'


@pytest.mark.parametrize("content", [*DAMAGED, NEWER], ids=range(len(DAMAGED) + 1))
def test_damaged_or_newer_lease_is_named_in_one_line(content: str, output: Location) -> None:
    file = Path(output.path) / "_running" / f"{'0' * 32}.json"
    file.parent.mkdir(parents=True)
    file.write_text(content)
    line = f"{file}: not the lease of a run, or one of another version; if no run uses the folder, delete it"
    with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
        Lease(output).__enter__()
    assert file.read_text() == content


def _race(path: str, start: object, results: object) -> None:
    output = locate(path, StorageConfig())
    start.wait()  # type: ignore[attr-defined]
    try:
        with Lease(output):
            results.put("won")  # type: ignore[attr-defined]
            time.sleep(1.5)
    except OutputInUseError:
        results.put("stopped")  # type: ignore[attr-defined]


def test_only_one_of_several_concurrent_runs_gets_the_lease(output: Location) -> None:
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


def test_missing_process_has_no_start_time() -> None:
    assert read_process_start(os.getpid())
    assert read_process_start(2**22 + 1) is None


def test_interrupted_start_leaves_no_lease(output: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: float) -> None:
        assert len(claims(output)) == 1
        raise SystemExit(143)

    monkeypatch.setattr("pipeline.storage.lease.time.sleep", interrupt)
    with pytest.raises(SystemExit), Lease(output):
        raise AssertionError
    assert claims(output) == []
