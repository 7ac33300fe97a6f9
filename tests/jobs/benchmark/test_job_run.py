import json
import os
import subprocess
from dataclasses import replace
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from jobs.benchmark.job_run import Job, compute_unit_seconds
from jobs.benchmark.results import CALL, FILES, STAGES
from pipeline.config.run import load_config
from pipeline.config.sections import DecodingConfig, ModelConfig, StorageConfig
from pipeline.output.unit_files import UnitSummary
from pipeline.output.unit_log import write_units
from pipeline.storage.location import locate

WARMING = [{"id": "w", "query": "warm?"}]
REPEATS = [[{"id": f"{n}", "query": f"{n}?"} for n in range(begin, begin + 4)] for begin in (0, 4)]
ENGINE = {"max_num_seqs": 16, "compilation_config": {"cudagraph_capture_sizes": [1, 8, 64]}}


def unit(began: float, ended: float, rows: int = 4, errors: int = 0) -> UnitSummary:
    return UnitSummary("u", rows, {"KeyError": errors} if errors else {}, began=began, ended=ended)


@pytest.fixture
def called(monkeypatch, tmp_path):
    """The run's inputs; its measured units took two and four seconds of each stage, and ten and twenty in all."""
    seen = {}

    def run(command, **_):
        output = tmp_path / "out"
        seen["settings"] = yaml.safe_load((tmp_path / "run.yaml").read_text())
        seen["files"] = [pq.read_table(file)["id"].to_pylist() for file in sorted((tmp_path / "queries").iterdir())]
        (output / "data").mkdir(parents=True)
        for name, seconds in (("c" * 20, 99.0), ("b" * 20, 2.0), ("a" * 20, 4.0)):
            rows = [{"usage": dict.fromkeys(STAGES, seconds)}] * 4
            pq.write_table(pa.Table.from_pylist(rows), output / "data" / f"part-{name}.parquet")
        os.utime(output / "data" / f"part-{20 * 'b'}.parquet", (1008.4, 1008.4))
        os.utime(output / "data" / f"part-{20 * 'a'}.parquet", (1028.8, 1028.8))
        units = {"c" * 20: unit(900.0, 999.0, 1), "b" * 20: unit(1000.0, 1008.0), "a" * 20: unit(1010.0, 1028.0)}
        finished = datetime.fromtimestamp(1030.0, UTC).isoformat()
        (output / "_manifest.json").write_text(json.dumps({"finished": finished}))
        write_units(locate(str(output), StorageConfig()), [replace(one, unit=name) for name, one in units.items()])
        return subprocess.CompletedProcess(command, seen.get("status", 0), json.dumps({"seconds": 150.0}), "why")

    monkeypatch.setattr(subprocess, "run", run)
    return seen


def job(tmp_path) -> Job:
    return Job(tmp_path, ModelConfig(name="demo", engine=ENGINE), DecodingConfig(passages=3), WARMING, REPEATS)


def test_each_unit_but_the_first_is_a_repeat(tmp_path, called):
    rates, seconds = job(tmp_path).run()
    assert rates == pytest.approx([4 / 10, 4 / 20])
    assert seconds == {**dict.fromkeys(STAGES, 3.0), FILES: pytest.approx((0.4 + 0.8) / 8), CALL: 150.0}


def test_units_are_files_processed_one_at_a_time(tmp_path, called):
    job(tmp_path).run()
    assert called["files"] == [["w"], ["0", "1", "2", "3"], ["4", "5", "6", "7"]]
    assert called["settings"]["execution"] == {"unit_rows": 4, "units_in_flight": 1}


def test_job_gets_the_settings_and_the_engine_arguments(tmp_path, called):
    job(tmp_path).run()
    config = load_config(str(tmp_path / "run.yaml"), [], {"queries": "q", "output": "o", "index": "i"})
    assert config.model.engine == ENGINE
    assert config.decoding.passages == 3


def test_failed_job_is_reported_with_its_status_and_error(tmp_path, called):
    called["status"] = 1
    with pytest.raises(RuntimeError, match=r"jobs\.annotate exited with status 1: why"):
        job(tmp_path).run()


def test_unit_lasts_until_the_next_one_begins():
    units = {"c": unit(1, 2), "b": unit(3, 4), "a": unit(6, 9)}
    assert compute_unit_seconds(units, 10.0) == {"b": 3.0, "a": 4.0}


def test_earliest_unit_is_not_measured_wherever_it_is_in_the_query_set():
    units = {"c": unit(3, 4), "b": unit(6, 9), "a": unit(1, 2)}
    assert compute_unit_seconds(units, 10.0) == {"c": 3.0, "b": 4.0}


@pytest.mark.parametrize(
    ("units", "problem"),
    [
        ({"a": unit(1, 2), "b": unit(3, 4, errors=1)}, "1 rows of the job failed"),
        ({"a": unit(1, 3.5), "b": unit(3, 4)}, "units overlapped"),
        ({"a": unit(3, 4), "b": unit(1, 3.5)}, "units overlapped"),
    ],
)
def test_unexpected_units_are_refused(units, problem):
    with pytest.raises(RuntimeError, match=problem):
        compute_unit_seconds(units, 5.0)
