"""Kills the processes of an engine whose owner, the process that started it, has ended.

vLLM's engine does not notice that its owner was killed, and keeps its memory allocated, GPU memory included
(vllm-project/vllm#55510). Ray ends the processes that it has started, but not their children.
"""

import subprocess
import sys
from collections.abc import Sequence

# Waits for the end of the pipe from its owner, which closes however the owner ends. ``psutil`` distinguishes a process
# from a later one with the same pid.
_WAIT_AND_END = """
import sys, psutil
watched = []
for number in sys.argv[1:]:
    try:
        watched.append(psutil.Process(int(number)))
    except psutil.NoSuchProcess:
        pass
sys.stdin.read()
for process in watched:
    try:
        for one in [*process.children(recursive=True), process]:
            one.kill()
    except psutil.NoSuchProcess:
        pass
"""


def start_guard(pids: Sequence[int]) -> subprocess.Popen[bytes]:
    """Start a guard process that kills the given processes and their children when this process ends in any way.

    Returns:
        The guard process. Closing its ``stdin`` triggers it, so keep that open for as long as the processes are needed.
    """
    command = [sys.executable, "-c", _WAIT_AND_END, *map(str, pids)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)  # noqa: S603  our own command
