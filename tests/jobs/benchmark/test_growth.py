"""The growth benchmark measures real runs, in which no row is lost."""

import json
from pathlib import Path

import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from jobs.benchmark import growth
from jobs.benchmark.growth import make_rows, measure_growth, write_questions
from pipeline.config.sections import StorageConfig
from pipeline.output.unit_log import read_units
from pipeline.storage.location import locate

PHASES = ["plan", "run, count, report", "plan again", "resume, a tenth left", "repeat when finished", "report"]


def test_questions_differ_and_are_divided_into_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(growth, "FILE_ROWS", 4)
    write_questions(tmp_path / "all", 10, 4)
    write_questions(tmp_path / "few", 10, 1)
    assert [pq.read_metadata(file).num_rows for file in sorted((tmp_path / "all").iterdir())] == [4, 4, 2]
    assert [pq.read_metadata(file).num_rows for file in sorted((tmp_path / "few").iterdir())] == [1, 1, 1]
    assert make_rows(8, 2).to_pylist() == [
        {"id": "question-8", "query": "What is the answer to question 8?"},
        {"id": "question-9", "query": "What is the answer to question 9?"},
    ]


@pytest.mark.slow
@pytest.mark.parametrize("hollow", [False, True])
def test_every_row_is_answered_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hollow: bool):
    monkeypatch.setattr(growth, "FILE_ROWS", 1_500)
    monkeypatch.setenv(growth.HOLLOW, "")
    found = measure_growth(4_000, tmp_path, hollow, hollow)
    assert (found.rows, [phase.name for phase in found.phases]) == (4_000, PHASES)
    assert found.units == 6 + 6 + 4  # of 256 rows: 1,500, 1,500 and 1,000 rows
    table = ds.dataset(tmp_path / "out" / "data", format="parquet").to_table()
    assert len(set(table["id"].to_pylist())) == (10 if hollow else 4_000)
    assert table.num_rows == (16 * 10 if hollow else 4_000)
    manifest = json.loads((tmp_path / "out" / "_manifest.json").read_text())
    assert manifest["counts"]["rows"] == 4_000
    assert len(read_units(locate(str(tmp_path / "out"), StorageConfig()))) == found.units
    assert (tmp_path / "out" / "report.html").exists()
