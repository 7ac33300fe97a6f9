import os
import subprocess
import sys

import pytest

from pipeline.engine.postmortem import Death, ErrorLog, configure_error_log, diagnose_death

SILENT = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
TRACEBACK = """ERROR 2026-01-01 [vllm.v1.engine.core] EngineCore encountered a fatal error.
Traceback (most recent call last):
  File "core.py", line 1, in run
    raise RuntimeError("CUDA out of memory, says this line of code")
RuntimeError: device-side assert triggered
"""


@pytest.mark.parametrize(
    ("codes", "log", "expected"),
    [
        ([1], TRACEBACK, Death("RuntimeError: device-side assert triggered", out_of_memory=False)),
        (
            [1],
            "torch.OutOfMemoryError: CUDA out of memory.\n"
            "RuntimeError: Worker failed with error 'CUDA out of memory.'\n",
            Death("RuntimeError: Worker failed with error 'CUDA out of memory.'", out_of_memory=True),
        ),
        (
            [1],
            "RuntimeError: DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes",
            Death(
                "RuntimeError: DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes",
                out_of_memory=True,
            ),
        ),
        ([-9], "", Death("killed by signal 9, possibly because the machine ran out of memory", out_of_memory=False)),
        (
            [1],
            f"{TRACEBACK}vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue.\n",
            Death("RuntimeError: device-side assert triggered", out_of_memory=False),
        ),
        ([-11], "", Death("exited with status -11", out_of_memory=False)),
        ([], "", Death("no exit code and no logged error", out_of_memory=False)),
    ],
)
def test_cause_of_death_follows_from_exit_codes_and_log(codes, log, expected):
    assert diagnose_death(codes, log) == expected


def test_error_log_starts_at_the_engine_start(tmp_path):
    file = tmp_path / "errors"
    file.write_text("of another\n")
    log = ErrorLog(file, file.stat().st_size)
    assert log.read() == ""
    file.write_text("of another\nof this\n")
    assert log.read() == "of this\n"
    assert ErrorLog(None, 0).read() == ErrorLog(tmp_path / "none", 0).read() == ""


@pytest.mark.parametrize(
    ("name", "value"), [("VLLM_CONFIGURE_LOGGING", "0"), ("VLLM_LOGGING_CONFIG_PATH", "mine.json")]
)
def test_existing_logging_configuration_is_kept(monkeypatch, name, value):
    configure_error_log.cache_clear()
    monkeypatch.setenv(name, value)
    assert ErrorLog.from_now() == ErrorLog(None, 0)
    configure_error_log.cache_clear()


def test_follow_up_errors_are_written_only_to_the_file(tmp_path):
    script = """
import json, logging, logging.config, os
from pipeline.engine.postmortem import configure_error_log
file = configure_error_log()
logging.config.dictConfig(json.load(open(os.environ["VLLM_LOGGING_CONFIG_PATH"])))
for name in ("vllm.v1.engine.core", "vllm.v1.engine.async_llm", "vllm.v1.engine.core_client"):
    logging.getLogger(name).error("%s speaks", name.rsplit(".")[-1])
print(file.read_text())
"""
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=SILENT)
    assert [line.split()[-2] for line in said.stdout.splitlines() if line] == ["core", "async_llm", "core_client"]
    assert [line.split()[-2] for line in said.stderr.splitlines()] == ["core"]


@pytest.mark.parametrize(
    ("level", "heard"), [({}, ["scheduler"]), ({"VLLM_LOGGING_LEVEL": "WARNING"}, ["vllm", "scheduler"])]
)
def test_startup_warnings_are_shown_only_if_a_level_is_set(level, heard):
    script = """
import json, logging, logging.config, os
from pipeline.engine.postmortem import configure_error_log
configure_error_log()
logging.config.dictConfig(json.load(open(os.environ["VLLM_LOGGING_CONFIG_PATH"])))
for name in ("vllm.config.vllm", "vllm.v1.core.scheduler"):
    logging.getLogger(name).warning("%s speaks", name.rsplit(".")[-1])
"""
    said = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=SILENT | level
    )
    assert [line.split()[-2] for line in said.stderr.splitlines()] == heard
