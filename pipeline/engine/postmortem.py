"""Why an engine died, from what it left behind: its processes' exit codes and the errors they logged.

vLLM tells its front end only *that* the engine is dead; the exception itself is known to the engine's own process.
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

# A traceback's last line, unless it is vLLM's front end that hears of the death; and words in it by which PyTorch and
# CUDA say that memory is exhausted.
_RAISED = re.compile(r"^(?![\w.]*EngineDeadError)[A-Za-z_][\w.]*(?:Error|Exception)\b.*", re.MULTILINE)
_MEMORY = re.compile(r"out of memory|OutOfMemory|can't allocate memory|MemoryError|bad_alloc", re.IGNORECASE)
# Who says, with a traceback, that an engine is gone: also of one that ends with the run that it belongs to. Where it
# matters ``EngineDeadError`` says so, with the cause.
_FRONT_END = ("vllm.v1.engine.async_llm", "vllm.v1.engine.core_client")
# Who warns at every start on a CPU: of Triton, of libraries to preload, of settings that follow from ours. Not heard
# unless VLLM_LOGGING_LEVEL is set.
_START_UP = (
    "vllm.config.vllm",
    "vllm.platforms.cpu",
    "vllm.v1.engine.input_processor",
    "vllm.v1.worker.cpu_worker",
)


@dataclass(frozen=True)
class Death:
    """How an engine ended.

    Attributes:
        reason: one line.
        out_of_memory: whether memory was exhausted, which is the settings' fault rather than a row's.
    """

    reason: str
    out_of_memory: bool


@dataclass(frozen=True)
class ErrorLog:
    """What an engine's processes log as errors.

    Attributes:
        file: to which all engines of this process append; None where somebody else has configured vLLM's logging.
        start: where in the file this engine's errors begin.
    """

    file: Path | None
    start: int

    @classmethod
    def from_now(cls) -> "ErrorLog":
        """The log of an engine that is about to start; see :func:`error_file` for when that is too late."""
        file = error_file()
        return cls(file, file.stat().st_size if file and file.exists() else 0)

    def text(self) -> str:
        """What is in it by now."""
        if self.file is None or not self.file.exists():
            return ""
        return self.file.read_bytes()[self.start :].decode(errors="replace")


@functools.cache
def error_file() -> Path | None:
    """Have all engines of this process append their errors to a file; None where vLLM's logging is configured.

    Must be called before vLLM is imported: its processes find the file through ``VLLM_LOGGING_CONFIG_PATH``
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
    settings = {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"plain": {"format": "%(levelname)s %(asctime)s [%(name)s] %(message)s"}},
        "handlers": handlers,
        "loggers": {
            "vllm": {"handlers": list(handlers), "level": level or "WARNING", "propagate": False},
            **{name: {"handlers": ["errors"], "propagate": False} for name in _FRONT_END},
            **{name: {"level": "ERROR"} for name in _START_UP if level is None},
        },
    }
    (folder / "logging.json").write_text(json.dumps(settings))
    os.environ["VLLM_LOGGING_CONFIG_PATH"] = str(folder / "logging.json")
    return folder / "errors"


def cause_of_death(exit_codes: Iterable[int], log: str) -> Death:
    """What ended an engine.

    Args:
        exit_codes: of its processes, as ``multiprocessing`` has them: negative for a signal.
        log: what they logged as errors.
    """
    codes, raised = sorted(exit_codes), _RAISED.findall(log)
    if raised:
        return Death(raised[-1], out_of_memory=bool(_MEMORY.search(raised[-1])))
    if -9 in codes:
        return Death("killed by signal 9, as by a machine that runs out of memory", out_of_memory=False)
    return Death(f"ended with status {codes[0]}" if codes else "no sign of life", out_of_memory=False)
