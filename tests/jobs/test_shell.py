"""What a command prints in any encoding, and how it ends when it is interrupted."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.cli import JOBS, app
from jobs.shell import Application

ROOT = Path(__file__).parents[2]
# A job that prints a line when its work begins, and one when it has released what it held.
JOB = """
import signal, sys, time
from jobs.common import working
from jobs.shell import run

def job() -> None:
    with working(resumable={resumable}):
        try:
            print("working", flush=True)
            {work}
        finally:
            {release}
            print("released", flush=True)

{before}
run(job)
"""
# Seconds for a signal, and after a second one, that the main thread does not handle.
LIMITS = "import jobs.shell; jobs.shell.PATIENCE_S, jobs.shell.GRACE_S = {}, 0.1"
# Waits for a lock that is never released, in C code, which no signal but that of the alarm ends.
STUCK = (
    "import ctypes; signal.alarm(60); c, lock = ctypes.CDLL(None), bytes(64); "
    "c.pthread_mutex_lock(lock); c.pthread_mutex_lock(lock)"
)


def start(
    resumable: bool = False, release: str = "pass", before: str = "", work: str = "time.sleep(60)"
) -> subprocess.Popen[str]:
    """Start a job and wait for its work."""
    script = JOB.format(resumable=resumable, release=release, before=before, work=work)
    command = [sys.executable, "-c", script]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    assert process.stdout.readline() == "working\n"
    return process


def start_stuck(before: str, resumable: bool = False) -> subprocess.Popen[str]:
    """Start a job and wait until its main thread is in C code."""
    process = start(resumable, before=before, work=STUCK)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    return process


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(
    ("resumable", "line"), [(True, "interrupted; the same command continues it\n"), (False, "interrupted\n")]
)
def test_interrupted_command_releases_what_it_holds(
    number: signal.Signals, status: int, resumable: bool, line: str
) -> None:
    process = start(resumable)
    process.send_signal(number)
    assert process.communicate(timeout=20) == ("released\n", line)
    assert process.returncode == status


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_ends_a_command_at_once(first: signal.Signals, second: signal.Signals) -> None:
    process = start(release="print('releasing', flush=True); time.sleep(60)")
    process.send_signal(first)
    assert process.stdout is not None
    assert process.stdout.readline() == "releasing\n"
    process.send_signal(second)
    assert process.communicate(timeout=20) == ("", "")
    assert process.returncode == -second


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_command_stuck_in_c_code_ends_after_a_while(number: signal.Signals, status: int) -> None:
    process = start_stuck(LIMITS.format(0.5), resumable=True)
    process.send_signal(number)
    assert process.communicate(timeout=20) == ("", "interrupted\n")
    assert process.returncode == status


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("first", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_second_signal_ends_a_command_stuck_in_c_code(
    first: signal.Signals, second: signal.Signals, status: int
) -> None:
    process = start_stuck(LIMITS.format(3600))
    process.send_signal(first)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    process.send_signal(second)
    assert process.communicate(timeout=20) == ("", "interrupted\n")
    assert process.returncode == status


def test_command_stuck_in_c_code_ends_without_an_open_stderr() -> None:
    process = start_stuck(LIMITS.format(0.1) + "; import os; os.close(2)")
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143


@pytest.mark.parametrize(
    "work",
    [
        "pid = os.fork(); time.sleep(0.5 if pid else 60); os.kill(pid, signal.SIGTERM); os.waitpid(pid, 0)",
        "signal.signal(signal.SIGUSR1, print); os.kill(os.getpid(), signal.SIGUSR1)",
    ],
    ids=["signal of a forked child", "signal of another kind"],
)
def test_signals_that_are_no_interruption_do_not_end_a_command(work: str) -> None:
    process = start(before=f"import os; {LIMITS.format(0.1)}", work=f"{work}; time.sleep(1); print('finished')")
    output, errors = process.communicate(timeout=20)
    assert output.endswith("finished\nreleased\n")
    assert process.returncode == 0, errors


def test_slow_release_of_what_a_command_holds_is_not_cut_short() -> None:
    process = start(before=LIMITS.format(0.1), release="time.sleep(1)")
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20) == ("released\n", "interrupted\n")


def test_command_that_waits_for_a_silent_store_can_be_interrupted(tmp_path: Path) -> None:
    arguments = ["annotate", "--queries", "s3://bucket/q", "--output", f"{tmp_path}/out", "--model", "demo"]
    script = f"import sys; from jobs.cli import app; {LIMITS.format(0.5)}; sys.argv[1:] = {arguments}; app()"
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        store = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.getsockname()[1]}", "AWS_REGION": "us-east-1"}
        keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
        process = subprocess.Popen(
            [sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, env=os.environ | store | keys, cwd=ROOT
        )
        connection, _ = server.accept()
        with connection:
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (143, "interrupted\n")


DEFERRED = """
from jobs.shell import deferring

def request() -> float:
    print("requested", flush=True)
    {request}
    return {seconds}

def work() -> None:
    with deferring(request):
        print("deferring", flush=True)
        {work}
        print("ended", flush=True)
"""


def start_deferring(seconds: float, work: str, request: str = "pass", before: str = "") -> subprocess.Popen[str]:
    """Start a job that defers SIGTERM, and wait until it does."""
    deferred = DEFERRED.format(seconds=seconds, work=work, request=request)
    process = start(True, before=f"{deferred}\n{before}", work="work()")
    assert process.stdout is not None
    assert process.stdout.readline() == "deferring\n"
    return process


@pytest.mark.parametrize("signals", [1, 2])
def test_deferred_signal_lets_work_end_and_the_command_with_it(signals: int) -> None:
    """Two signals that arrive almost at once are one."""
    process = start_deferring(60, "time.sleep(1.5)", before=LIMITS.format(0.3) if signals == 1 else "")
    for _ in range(signals):
        process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=20)
    assert (output, errors) == ("requested\nended\nreleased\n", "interrupted; the same command continues it\n")
    assert process.returncode == 143


@pytest.mark.parametrize(
    ("seconds", "request_", "warning"),
    [(0.3, "pass", ""), (0, "pass", ""), (60, "raise KeyError(5)", "the work in flight cannot end in order: 5\n")],
)
def test_deferred_signal_ends_work_that_takes_too_long(seconds: float, request_: str, warning: str) -> None:
    process = start_deferring(seconds, "time.sleep(60)", request_)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=20)
    assert output == "requested\nreleased\n"
    assert errors == f"{warning}interrupted; the same command continues it\n"
    assert process.returncode == 143


@pytest.mark.parametrize(("second", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_second_signal_ends_work_whose_signal_was_deferred(second: signal.Signals, status: int) -> None:
    process = start_deferring(60, "time.sleep(60)", before="import jobs.shell; jobs.shell.GRACE_S = 0.1")
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None
    assert process.stdout.readline() == "requested\n"
    time.sleep(0.3)
    process.send_signal(second)
    assert process.communicate(timeout=20)[0] == "released\n"
    assert process.returncode == status


def test_work_stuck_in_c_code_ends_after_its_signal_was_deferred() -> None:
    stuck = STUCK.replace("signal.alarm(60)", "print('stuck', flush=True)").replace("; ", "\n        ")
    process = start_deferring(0.3, stuck, before=LIMITS.format(0.5))
    assert process.stdout is not None
    assert process.stdout.readline() == "stuck\n"
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=20)
    assert (output, errors) == ("", "interrupted\n")  # Python never got to handle it
    assert process.returncode == 143


@pytest.mark.parametrize("consumer", [False, True])
def test_failure_of_work_that_was_to_end_is_an_interruption_and_is_named(consumer: bool) -> None:
    """As when Ray's own processes have received the signal, too; of a generator's body, or of its consumer."""
    before = """
import contextlib
def generate():
    with deferring(request):
        print("deferring", flush=True)
        yield

def work():
    with contextlib.closing(generate()) as found:
        for _ in found:
            time.sleep(1)
            raise KeyError(5)
"""
    process = start_deferring(60, "time.sleep(1)\n        raise KeyError(5)", before=before if consumer else "")
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[1] == (
        "the work in flight failed before it had ended: 5\ninterrupted; the same command continues it\n"
    )
    assert process.returncode == 143


def test_second_signal_ends_a_command_whose_deferred_work_has_ended() -> None:
    stuck = STUCK.replace("signal.alarm(60)", "print('stuck', flush=True)")
    before = f"{LIMITS.format(0.1)}\ndef release():\n    {stuck}"
    deferred = DEFERRED.format(seconds=60, work="time.sleep(0.5)", request="pass")
    script = JOB.format(resumable=True, release="release()", before=f"{deferred}\n{before}", work="work()")
    process = subprocess.Popen([sys.executable, "-c", script], stdout=-1, stderr=-1, text=True, cwd=ROOT)
    assert process.stdout is not None
    for line in ("working", "deferring", "requested", "ended", "stuck"):
        assert process.stdout.readline() == f"{line}\n"
        if line == "deferring":
            process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == -signal.SIGTERM


def test_request_that_is_not_answered_ends_the_work() -> None:
    process = start_deferring(60, "time.sleep(60)", "time.sleep(60)", LIMITS.format(0.5))
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20) == ("requested\nreleased\n", "interrupted; the same command continues it\n")
    assert process.returncode == 143


def test_interrupted_command_that_overwrites_names_the_command_that_continues_it() -> None:
    script = (
        "import time; from jobs.common import working; from jobs.shell import run\ndef job():\n"
        " with working(resumable=True, overwrite=True):\n  print('working', flush=True)\n  time.sleep(60)\nrun(job)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=-1, stderr=-1, text=True, cwd=ROOT)
    assert process.stdout is not None
    assert process.stdout.readline() == "working\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[1] == "interrupted; the same command without --overwrite continues it\n"


def test_signal_is_no_longer_deferred_after_the_work() -> None:
    before = "work_ = work; work = lambda: (work_(), print('after', flush=True), time.sleep(60))"
    process = start_deferring(60, "pass", before=before)
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["ended\n", "after\n"]
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[0] == "released\n"
    assert process.returncode == 143


def test_ignored_signal_stays_ignored() -> None:
    process = start(before="signal.signal(signal.SIGINT, signal.SIG_IGN)")
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "cp437", "ascii:strict", "utf-8:ignore"])
def test_any_encoding_can_print_all_characters(encoding: str) -> None:
    script = "from jobs.shell import run\nrun(lambda: print('δ … 漢'))"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, env={"PYTHONIOENCODING": encoding}, check=False, cwd=ROOT
    )
    assert (result.returncode, result.stderr) == (0, b"")
    name = encoding.partition(":")[0]
    assert result.stdout.decode(name).rstrip("\n") == "δ … 漢".encode(name, "backslashreplace").decode(name)


@pytest.mark.parametrize("command", [[], ["annotate"], ["import-queries"], ["doctor"]])
def test_help_is_printed_in_ascii(command: list[str]) -> None:
    arguments = [sys.executable, "-m", "jobs.cli", *command, "--help"]
    environment = {"PYTHONIOENCODING": "ascii", "HOME": str(Path.home())}
    result = subprocess.run(arguments, capture_output=True, env=environment, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert b"Usage" in result.stdout


def test_every_job_starts_in_the_same_way() -> None:
    mains = {file: file.read_text().rpartition('if __name__ == "__main__":')[2] for file in ROOT.glob("jobs/**/*.py")}
    started = {
        file.stem for file, main in mains.items() if re.search(r"^    (run\(|main\(\)|app\(\))", main, re.MULTILINE)
    }
    assert {name.removeprefix("benchmark_") for name in JOBS if name != "benchmark"} <= started
    assert not [file for file in mains if "typer.run(" in file.read_text()]
    assert isinstance(app, Application)
