"""Ends the processes of an engine whose owner is gone.

vLLM's engine does not notice that the process that started it was killed, and goes on holding its memory, a GPU's too
(vllm-project/vllm#55510); Ray ends the processes that it has started, not theirs.
"""

import subprocess
import sys
from collections.abc import Sequence

# Waits until the pipe from its owner ends, however that came about. ``psutil`` knows a process from another one that
# has got its number.
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


def guard(pids: Sequence[int]) -> subprocess.Popen[bytes]:
    """Have processes, and those that they have started, killed when this process ends in whatever way.

    Returns:
        The process that waits for it; its ``stdin`` must stay open until then.
    """
    command = [sys.executable, "-c", _WAIT_AND_END, *map(str, pids)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)  # noqa: S603  our own command
