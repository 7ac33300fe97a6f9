"""The units of a set: found in the log and in the files, and chosen for reading."""

import dataclasses
import logging
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.output.folder import OutputFolder
from pipeline.output.unit_files import UnitSummary
from pipeline.output.unit_log import read_units, write_units
from pipeline.report import units as report_units
from pipeline.report.units import FinishedUnit, choose_units, find_units, map_units
from tests.support.reports import answered, at, failed, write_set

IDS = [f"{number:020x}" for number in range(3)]


def counts(output: OutputFolder) -> list[tuple[str, int, dict[str, int], int, int]]:
    found = [unit.summary for unit in find_units(output)]
    return [(unit.unit, unit.rows, unit.errors, unit.retrieved, unit.generated_tokens) for unit in found]


def finished(*rows: int) -> list[FinishedUnit]:
    summaries = [UnitSummary(str(n), count) for n, count in enumerate(rows)]
    return [FinishedUnit(summary, at("d"), None, (summary,)) for summary in summaries]


def test_summaries_come_from_the_log_without_opening_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = write_set(tmp_path, [answered("a"), failed("b")], [answered("c")])
    monkeypatch.setattr(report_units, "read_columns", None)
    assert counts(output) == [(IDS[0], 2, {"ValueError": 1}, 1, 10), (IDS[1], 1, {}, 1, 10)]
    assert [unit.errors is not None for unit in find_units(output)] == [True, False]


def test_units_that_are_not_logged_are_read_from_their_files(tmp_path: Path) -> None:
    output = write_set(tmp_path, [answered("a"), failed("b")], [answered("c")], [answered("d")], finished=False)
    expected = [(IDS[0], 2, {"ValueError": 1}, 1, 10), (IDS[1], 1, {}, 1, 10), (IDS[2], 1, {}, 1, 10)]
    assert counts(output) == expected
    write_units(output.location, [find_units(output)[1].summary])  # its size is not known
    assert counts(output) == expected
    (tmp_path / "data" / f"part-{IDS[1]}.parquet").unlink()  # logged, but not there
    assert counts(output) == [expected[0], expected[2]]


def test_logged_unit_whose_file_was_replaced_is_read_from_its_files(tmp_path: Path) -> None:
    output = write_set(tmp_path, [answered("a")])
    (logged,) = read_units(output.location).values()
    write_units(output.location, [dataclasses.replace(logged, rows=9, data_bytes=logged.data_bytes + 1)])
    assert counts(output) == [(IDS[0], 1, {}, 1, 10)]


def test_units_without_summaries_as_in_older_sets_are_counted(tmp_path: Path) -> None:
    output = write_set(tmp_path, [answered("a"), answered("b"), failed("c")], finished=False)
    for file in tmp_path.glob("*/part-*"):
        pq.write_table(pq.read_table(file).replace_schema_metadata(None), file)
    assert counts(output) == [(IDS[0], 3, {"ValueError": 1}, 2, 20)]
    file = tmp_path / "data" / f"part-{IDS[0]}.parquet"
    pq.write_table(pq.read_table(file).drop_columns(["usage"]), file)
    with pytest.raises(ValueError, match=r"part-0+\.parquet: no column 'usage'"):
        find_units(output)


def test_damaged_log_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    output = write_set(tmp_path, [answered("a")])
    (tmp_path / "_units.parquet").write_bytes(b"PAR1")
    with caplog.at_level(logging.WARNING):
        assert counts(output) == [(IDS[0], 1, {}, 1, 10)]
    assert "the report reads the files of the units instead" in caplog.text


@pytest.mark.parametrize(
    ("rows", "chosen"),
    [
        ([], 0),
        ([4, 3, 3], 3),  # ten rows are read as a whole
        ([4, 3, 4], 2),
        ([4, 7, 1], 1),  # whole units only, without gaps
        ([11, 1], 1),  # at least one
        ([0, 11, 1], 2),  # that has rows
    ],
)
def test_first_units_of_at_most_so_many_rows_are_chosen(
    rows: list[int], chosen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_units, "MOST_ROWS", 10)
    units = finished(*rows)
    assert choose_units(units) == units[:chosen]


def test_units_are_read_in_batches_of_so_many_units_and_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_units, "BATCH_UNITS", 3)
    monkeypatch.setattr(report_units, "BATCH_ROWS", 10)
    batches = []

    def work_alone(work, batch):
        batches.append([unit.summary.rows for unit in batch])
        return [work(unit) for unit in batch]

    monkeypatch.setattr(report_units, "map_in_threads", work_alone)
    rows = [5, 5, 1, 12, 2, 2, 2, 2]
    assert list(map_units(lambda unit: unit.summary.rows, finished(*rows))) == rows
    assert batches == [[5, 5], [1], [12], [2, 2, 2], [2]]
