"""The GPU suite and its script, where there is no GPU: nothing passes there unseen."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.conftest import why_not
from tests.gpu.cpu_answers import FILE, make_record

ROOT = Path(__file__).parents[2]


def suite(**environment: str) -> str:
    """What ``pytest -m gpu`` says."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-rs", "-p", "no:cacheprovider", "tests/gpu"]
    others = {name: value for name, value in os.environ.items() if not name.startswith("SELFRAG_GPU")}
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False, env=others | environment
    )
    return done.stdout


@pytest.mark.skipif(why_not() is None, reason="there is a GPU")
def test_skipped_gpu_tests_give_a_reason() -> None:
    said = suite()
    counted = re.search(r"\b(\d+) skipped in", said)
    assert counted, said
    reasons = re.findall(r"^SKIPPED \[(\d+)\] \S+ no GPU: .+$", said, re.MULTILINE)
    assert sum(map(int, reasons)) == int(counted[1]) >= 30


@pytest.mark.skipif(why_not() is None, reason="there is a GPU")
def test_suite_fails_if_a_required_gpu_is_missing() -> None:
    said = suite(SELFRAG_GPU_REQUIRED="1")
    assert re.search(r"\b\d+ errors in", said), said
    assert " skipped" not in said
    assert " passed" not in said


def test_reference_answers_are_of_the_current_model() -> None:
    record = json.loads(FILE.read_text())
    answers = record.pop("answers")
    assert record == make_record(), "run: python -m tests.gpu.cpu_answers"
    assert len(answers) == 72
    assert sum(retrieved for retrieved, _ in answers.values()) > 55


STUB = """#!/bin/bash
echo "$@" >> {calls}
[[ "$2" == pytest && -z "$SELFRAG_GPU_REQUIRED" ]] && exit 4
[[ "$2" == "{failing}" ]] && exit 3
exit 0
"""


def check(folder: Path, failing: str = "") -> tuple[int, list[str], str]:
    """Run the script with an interpreter that only notes what it is called with."""
    stub, calls = folder / "python", folder / "calls"
    stub.write_text(STUB.format(calls=calls, failing=failing))
    stub.chmod(0o755)
    done = subprocess.run(
        [ROOT / "infra" / "gpu_check.sh", folder / "results"],
        env={**os.environ, "PYTHON": str(stub), "SELFRAG_GPU_REHEARSAL": ""},
        capture_output=True,
        timeout=60,
        check=False,
    )
    return done.returncode, calls.read_text().splitlines(), (folder / "results" / "summary.txt").read_text()


def test_script_runs_doctor_benchmark_and_suite_into_one_folder(tmp_path: Path) -> None:
    status, calls, summary = check(tmp_path)
    assert status == 0
    assert [call.split()[1] for call in calls] == ["jobs.cli", "jobs.doctor", "jobs.benchmark", "pytest"]
    assert "--shape 7b" in calls[2]
    assert f"--json {tmp_path}/results/benchmark.json" in calls[2]
    assert f"--junitxml {tmp_path}/results/suite.xml" in calls[3]
    assert re.findall(r"^(\w+): status (\d+)", summary, re.MULTILINE) == [
        ("doctor", "0"),
        ("benchmark", "0"),
        ("suite", "0"),
    ]


def test_failed_step_fails_the_script_after_all_steps_have_run(tmp_path: Path) -> None:
    status, calls, summary = check(tmp_path, failing="jobs.benchmark")
    assert status == 1
    assert len(calls) == 4
    assert "benchmark: status 3" in summary
    assert "suite: status 0" in summary
