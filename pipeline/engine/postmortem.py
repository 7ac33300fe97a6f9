"""Finds the cause of an engine's death in the exit codes of its processes and the errors they logged.

vLLM's front end learns only *that* the engine is dead; the exception itself stays in the engine's process.
"""

import atexit
import functools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The last line of a traceback, except for the ``EngineDeadError`` that vLLM's front end raises as a consequence.
_RAISED = re.compile(r"^(?![\w.]*EngineDeadError)[A-Za-z_][\w.]*(?:Error|Exception)\b.*", re.MULTILINE)
# Words in that line by which PyTorch, CUDA, Python and C++ report exhausted memory.
_MEMORY = re.compile(r"out of memory|OutOfMemory|can't allocate memory|MemoryError|bad_alloc", re.IGNORECASE)
# Loggers that report a dead engine with a traceback, even one that ends normally with its run. They are kept off
# stderr: where the death matters, ``EngineDeadError`` carries its cause.
_FRONT_END = ("vllm.v1.engine.async_llm", "vllm.v1.engine.core_client")
# Loggers that warn at every start on a CPU, about Triton, libraries to preload, and settings derived from the engine's
# arguments. Silenced unless VLLM_LOGGING_LEVEL is set.
_START_UP = (
    "vllm.config.vllm",
    "vllm.platforms.cpu",
    "vllm.v1.engine.input_processor",
    "vllm.v1.worker.cpu_worker",
)


@dataclass(frozen=True)
class Death:
    """The death of an engine.

    Attributes:
        reason: the cause in one line.
        out_of_memory: whether memory was exhausted, which is caused by the settings rather than by a row.
    """

    reason: str
    out_of_memory: bool


@dataclass(frozen=True)
class ErrorLog:
    """The errors that the processes of one engine log.

    Attributes:
        file: log file that all engines of this process append to; None if vLLM's logging is configured elsewhere.
        start: offset in bytes at which this engine's errors begin.
    """

    file: Path | None
    start: int

    @classmethod
    def from_now(cls) -> "ErrorLog":
        """Return the log of an engine that is about to start; call it before vLLM is imported."""
        file = configure_error_log()
        return cls(file, file.stat().st_size if file and file.exists() else 0)

    def read(self) -> str:
        """Return the errors logged so far."""
        if self.file is None or not self.file.exists():
            return ""
        return self.file.read_bytes()[self.start :].decode(errors="replace")


@functools.cache
def configure_error_log() -> Path | None:
    """Configure vLLM's logging so that all engines of this process append their errors to one file; return its path.

    Returns None, and changes nothing, if the environment already configures vLLM's logging. Must be called before vLLM
    is imported: its processes find the file through ``VLLM_LOGGING_CONFIG_PATH``
    (https://docs.vllm.ai/en/latest/examples/others/logging_configuration.html).
    """
    if "VLLM_LOGGING_CONFIG_PATH" in os.environ or os.environ.get("VLLM_CONFIGURE_LOGGING") == "0":
        return None
    folder = Path(tempfile.mkdtemp(prefix="selfrag-engine-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    level = os.environ.get("VLLM_LOGGING_LEVEL")
    handlers = {
        "stderr": {"class": "logging.StreamHandler", "stream": "ext://sys.stderr", "formatter": "plain"},
        "errors": {"class": "logging.FileHandler", "filename": str(folder / "errors"), "level": "ERROR", "delay": True},
    }
    loggers: dict[str, dict[str, Any]] = {
        "vllm": {"handlers": list(handlers), "level": level or "WARNING", "propagate": False}
    }
    for name in _FRONT_END:
        loggers[name] = {"handlers": ["errors"], "propagate": False}
    if level is None:
        for name in _START_UP:
            loggers[name] = {"level": "ERROR"}
    settings = {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"plain": {"format": "%(levelname)s %(asctime)s [%(name)s] %(message)s"}},
        "handlers": handlers,
        "loggers": loggers,
    }
    (folder / "logging.json").write_text(json.dumps(settings))
    os.environ["VLLM_LOGGING_CONFIG_PATH"] = str(folder / "logging.json")
    return folder / "errors"


def diagnose_death(exit_codes: Iterable[int], log: str) -> Death:
    """Determine the cause of an engine's death: a logged exception if there is one, otherwise the exit codes.

    Args:
        exit_codes: exit codes of the engine's processes as in ``multiprocessing``: negative for a signal.
        log: errors that the processes logged.
    """
    codes, raised = sorted(exit_codes), _RAISED.findall(log)
    if raised:
        return Death(raised[-1], out_of_memory=bool(_MEMORY.search(raised[-1])))
    if -9 in codes:
        return Death("killed by signal 9, possibly because the machine ran out of memory", out_of_memory=False)
    reason = f"exited with status {codes[0]}" if codes else "no exit code and no logged error"
    return Death(reason, out_of_memory=False)
