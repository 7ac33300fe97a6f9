import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.engine.watchdog import start_guard

# Starts a process that has a child of its own, has them guarded, says their numbers and waits.
OWNER = """
import subprocess, sys, time
from pipeline.engine.watchdog import start_guard
child = "import subprocess, sys, time; print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"
watched = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE, start_new_session=True)
grandchild = watched.stdout.readline().decode().strip()
kept = start_guard([watched.pid])
time.sleep(1)
print(watched.pid, grandchild, flush=True)
time.sleep(600)
"""


def gone(pid: int) -> bool:
    """Whether a process has ended; a zombie that nobody has waited for has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_guarded_processes_end_with_their_owner(end: signal.Signals) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    pids = [int(pid) for pid in owner.stdout.readline().split()]
    assert not any(map(gone, pids))
    os.kill(owner.pid, end)
    owner.wait()
    until = time.monotonic() + 60
    while not all(map(gone, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    assert all(map(gone, pids))


def test_guard_ignores_processes_that_have_already_ended() -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    process = start_guard([ended.pid])
    process.communicate(timeout=10)
    assert process.returncode == 0
