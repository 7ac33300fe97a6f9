import json
import os
import subprocess
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from jobs.benchmark_job import Job, measured_unit
from jobs.benchmark_report import CALL, FILES, STAGES
from pipeline.config import DecodingConfig, ModelConfig, RunConfig

WARMING = [{"id": "w", "query": "warm?"}]
ROWS = [{"id": f"{n}", "query": f"{n}?"} for n in range(4)]


def unit(began: float, ended: float, rows: int = 4, errors: int = 0) -> dict[str, float]:
    return {"rows": rows, "errors": errors, "began": began, "ended": ended}


@pytest.fixture
def called(monkeypatch, tmp_path):
    """The settings of the run, whose second unit took two seconds of each stage and ten in all."""
    seen = {}

    def run(command, **_):
        output = tmp_path / "out"
        seen["settings"] = yaml.safe_load((tmp_path / "run.yaml").read_text())
        seen["files"] = [pq.read_table(file)["id"].to_pylist() for file in sorted((tmp_path / "queries").iterdir())]
        (output / "data").mkdir(parents=True)
        for name, seconds in (("a", 2.0), ("b", 99.0)):
            rows = [{"usage": dict.fromkeys(STAGES, seconds)}] * 4
            pq.write_table(pa.Table.from_pylist(rows), output / "data" / f"part-{name}.parquet")
        os.utime(output / "data" / "part-a.parquet", (1008.4, 1008.4))
        units = {"a": unit(1000.0, 1008.0), "b": unit(900.0, 999.0, rows=1)}
        finished = datetime.fromtimestamp(1010.0, UTC).isoformat()
        (output / "_manifest.json").write_text(json.dumps({"units": units, "finished": finished}))
        return subprocess.CompletedProcess(command, seen.get("status", 0), json.dumps({"seconds": 150.0}), "why")

    monkeypatch.setattr(subprocess, "run", run)
    return seen


def job(tmp_path) -> Job:
    return Job(tmp_path, ModelConfig(name="demo"), DecodingConfig(passages=3), WARMING, ROWS)


def test_the_second_unit_is_what_counts(tmp_path, called):
    rate, seconds = job(tmp_path).run()
    assert rate == pytest.approx(4 / 10)
    assert seconds == {**dict.fromkeys(STAGES, 2.0), FILES: pytest.approx(0.1), CALL: 150.0}


def test_units_are_files_that_come_one_after_the_other(tmp_path, called):
    job(tmp_path).run()
    assert called["files"] == [["w"], ["0", "1", "2", "3"]]
    assert called["settings"]["execution"] == {"unit_rows": 4, "units_in_flight": 1}
    rest = {"queries": "q", "output": "o", "index": "i"}
    assert RunConfig.model_validate({**called["settings"], **rest}).decoding.passages == 3


def test_a_run_that_fails_says_why(tmp_path, called):
    called["status"] = 1
    with pytest.raises(RuntimeError, match=r"jobs\.annotate ended with status 1: why"):
        job(tmp_path).run()


@pytest.mark.parametrize(
    ("units", "problem"),
    [
        ({"a": unit(1, 2), "b": unit(3, 4, errors=1)}, "1 rows of the job failed"),
        ({"a": unit(1, 3.5), "b": unit(3, 4)}, "one after the other"),
        ({"a": unit(1, 2), "b": unit(3, 4, rows=5)}, "one after the other"),
    ],
)
def test_a_unit_that_is_not_what_shall_be_measured_is_refused(units, problem):
    with pytest.raises(RuntimeError, match=problem):
        measured_unit(units, 4)
