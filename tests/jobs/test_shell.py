"""What a command prints in any encoding, and how it ends when it is interrupted."""

import re
import signal
import subprocess
import sys
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
            time.sleep(60)
        finally:
            {release}
            print("released", flush=True)

{before}
run(job)
"""


def start(resumable: bool = False, release: str = "pass", before: str = "") -> subprocess.Popen[str]:
    """Start a job and wait for its work."""
    script = JOB.format(resumable=resumable, release=release, before=before)
    command = [sys.executable, "-c", script]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    assert process.stdout.readline() == "working\n"
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
