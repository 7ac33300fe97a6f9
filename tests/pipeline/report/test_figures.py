"""The figures of a report, from sets written row by row."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.output.folder import OutputFolder
from pipeline.report import figures as report_figures
from pipeline.report import units as report_units
from pipeline.report.figures import (
    ALL_TASKS,
    BINS,
    MOST_TASKS,
    OTHERS,
    Failure,
    ReadOptions,
    SampleSize,
    SetFigures,
    compute_score_range,
    read_set,
)
from pipeline.storage.location import StorageError
from pipeline.storage.parquet import read_columns
from tests.support.reports import USAGE, answered, failed, segment, unread, write_set


def figures(output: OutputFolder) -> SetFigures:
    return read_set(output, ReadOptions.of(output.read_manifest() or {}))


def test_rows_errors_and_retrieval_are_counted_by_task_and_overall(tmp_path):
    one = [answered("a", task="qa"), unread("b", task="qa"), failed("c", task="qa")]
    two = [answered("d", task=""), failed("e", "TimeoutError", "too long", task="qa"), failed("f")]
    found = figures(write_set(tmp_path, one, two))
    assert {task: (g.rows, g.errors, g.retrieved) for task, g in found.groups.items()} == {
        "qa": (2, 2, 1),
        "(none)": (1, 1, 1),
    }
    overall = found.overall
    assert (overall.rows, overall.errors, overall.retrieval_rate, overall.error_rate) == (3, 3, 2 / 3, 0.5)
    assert found.groups["qa"].retrieval_rate == 0.5


def test_errors_are_counted_by_type_and_task_with_the_first_message(tmp_path):
    one = [failed("a", message="first"), failed("b", message="second"), failed("c", "TimeoutError", "slow", task="qa")]
    found = figures(write_set(tmp_path, one, [failed("d", message="third")]))
    assert found.failures == {("ValueError", "(none)"): Failure(3, "first"), ("TimeoutError", "qa"): Failure(1, "slow")}


def test_scores_are_distributed_over_segments_with_missing_counts(tmp_path):
    long = answered("a", segments=[segment(3.0, is_use=None), segment(1.0, is_use=-1.0, is_sup=0.0)])
    spreads = figures(write_set(tmp_path, [long, unread("b", 0.5)])).overall.spreads
    assert {name: (s.values, s.missing) for name, s in spreads.items()} == {
        "retrieve_probability": (2, 0),
        "is_rel": (2, 1),
        "is_sup": (2, 1),
        "is_use": (2, 1),
        "score": (3, 0),
    }
    assert spreads["score"].mean == pytest.approx(1.5)
    assert spreads["is_sup"].mean == pytest.approx(0.4)
    assert (spreads["is_use"].low, spreads["is_use"].counts[0], spreads["is_use"].counts[15]) == (-1.0, 1, 1)
    assert spreads["retrieve_probability"].counts.tolist() == [0, 0, 1, *[0] * (BINS - 5), 1, 0]  # 0.1 and 0.9


def test_values_outside_the_range_are_in_the_outer_bins(tmp_path):
    rows = [answered(str(n), segments=[segment(s, is_rel=s)]) for n, s in enumerate((-9.0, 0.0, 1.0, 9.0))]
    spreads = figures(write_set(tmp_path, rows)).overall.spreads
    assert spreads["is_rel"].counts.tolist() == [2, *[0] * (BINS - 2), 2]
    assert spreads["is_rel"].mean == 0.25


def test_absent_scores_have_empty_distributions(tmp_path):
    row = answered("a", retrieve_probability=None, segments=[])
    spreads = figures(write_set(tmp_path, [row])).overall.spreads
    assert {name: (s.values, s.missing, s.mean) for name, s in spreads.items()} == {
        "retrieve_probability": (0, 1, None),
        **dict.fromkeys(("is_rel", "is_sup", "is_use", "score"), (0, 0, None)),
    }


def test_usage_is_summed_and_its_seconds_are_distributed(tmp_path):
    slow = {**USAGE, "seconds": 40.0, "truncated_tokens": 7}
    found = figures(write_set(tmp_path, [answered("a"), answered("b"), unread("c")], [answered("d", usage=slow)]))
    assert found.counts == {
        "prompt_tokens": 400,
        "cached_tokens": 100,
        "generated_tokens": 40,
        "retrievals": 3,
        "empty_searches": 0,
        "engine_requests": 24,
        "truncated_tokens": 7,
    }
    seconds = found.durations["seconds"]
    assert (seconds.total, seconds.rows) == (52.0, 4)
    assert [seconds.quantile(q) for q in (0.5, 0.75, 0.99)] == pytest.approx([4.0, 4.0, 40.0], rel=0.005)
    assert found.durations["write_seconds"].total == pytest.approx(3.0 + 3.0 + 3.5 + 39.0)
    assert found.durations["retrieve_seconds"].quantile(0.25) == 0.0
    assert found.durations["decode_seconds"].total == 20.0


def test_row_without_usage_adds_nothing(tmp_path):
    found = figures(write_set(tmp_path, [answered("a"), answered("b", usage=None)]))
    assert (found.overall.rows, found.durations["seconds"].rows, found.counts["prompt_tokens"]) == (2, 1, 100)


def test_set_with_only_errors_has_no_row_figures(tmp_path):
    found = figures(write_set(tmp_path, [failed("a"), failed("b")]))
    assert (found.overall.rows, found.overall.errors, found.overall.retrieval_rate) == (0, 2, None)
    assert found.durations["seconds"].quantile(0.5) is None
    assert [unit.errors for unit in found.units] == [{"ValueError": 2}]


def test_set_without_finished_units_has_no_figures(tmp_path):
    found = figures(write_set(tmp_path, finished=False))
    assert (found.units, found.overall.rows, found.overall.error_rate) == ([], 0, None)


def test_errors_of_an_unfinished_unit_are_ignored(tmp_path):
    output = write_set(tmp_path, [answered("a"), failed("b")], [answered("c")], finished=False)
    (tmp_path / "data" / f"part-{0:020x}.parquet").unlink()
    assert (figures(output).overall.rows, figures(output).overall.errors) == (1, 0)


def test_time_of_the_reranker_is_no_part_of_the_writing(tmp_path):
    found = figures(write_set(tmp_path, [answered("a", usage={**USAGE, "rerank_seconds": 1.0})]))
    assert found.durations["rerank_seconds"].total == 1.0
    assert found.durations["write_seconds"].total == pytest.approx(4.0 - 0.5 - 0.5 - 1.0)


def test_usage_missing_in_earlier_versions_is_unknown(tmp_path):
    output = write_set(tmp_path, [answered("a")])
    file = tmp_path / "data" / f"part-{0:020x}.parquet"
    table = pq.read_table(file)
    rows = [{"seconds": 2.0, "generated_tokens": 3, "prompt_tokens": 1}]
    column = table.schema.get_field_index("usage")
    pq.write_table(table.set_column(column, "usage", [rows]), file)
    found = figures(output)
    assert (found.durations["seconds"].total, found.durations["decode_seconds"].rows) == (2.0, 0)
    assert found.counts["engine_requests"] == 0


def test_rare_tasks_are_merged_into_one_group(tmp_path):
    rows = [answered(str(n), task=f"t{n}") for n in range(MOST_TASKS + 5)]
    errors = [failed("x", task="t1"), failed("y", task="new"), failed("z", task="newer")]
    found = figures(write_set(tmp_path, rows[:20], rows[20:], errors))
    assert len(found.groups) == MOST_TASKS + 1
    assert (found.groups[OTHERS].rows, found.groups[OTHERS].errors) == (5, 2)
    assert (found.overall.rows, found.overall.errors) == (MOST_TASKS + 5, 3)
    assert {task: failure.rows for (_, task), failure in found.failures.items()} == {"t1": 1, OTHERS: 2}


def test_score_range_follows_from_the_weights():
    weights = {"sequence": 1.0, "relevance": 2.0, "support": 1.0, "utility": 0.5}
    tasks = {"x": {"decoding": {"weights": {**weights, "utility": 3.0}}}}
    assert compute_score_range({"configuration": {"decoding": {"weights": weights}}, "tasks": tasks}) == (-3.0, 7.0)
    assert compute_score_range({}) == (-0.5, 3.5)


def test_missing_column_is_named(tmp_path):
    output = write_set(tmp_path, [answered("a")])
    file = tmp_path / "data" / f"part-{0:020x}.parquet"
    pq.write_table(pq.read_table(file).drop_columns(["segments"]), file)
    with pytest.raises(ValueError, match=r"part-0+\.parquet: no column 'segments'"):
        figures(output)


def test_damaged_file_is_named(tmp_path):
    output = write_set(tmp_path, [answered("a")])
    (tmp_path / "data" / f"part-{0:020x}.parquet").write_bytes(b"PAR1")
    with pytest.raises(StorageError, match=r"part-0+\.parquet"):
        figures(output)


def test_figures_do_not_depend_on_the_number_of_units(tmp_path):
    rows = [answered(str(n), score=n / 100, task=("x", None)[n % 2]) for n in range(300)]
    whole, parts = figures(write_set(tmp_path / "a", rows)), figures(write_set(tmp_path / "b", *([r] for r in rows)))
    assert len(parts.units) == 300
    for task in ("x", "(none)"):
        one, other = whole.groups[task].spreads["score"], parts.groups[task].spreads["score"]
        assert np.array_equal(one.counts, other.counts)
        assert one.mean == pytest.approx(other.mean)
    best = {(p.kind, p.key) for p in whole.picks["x", "best"] + whole.picks["x", "worst"]}
    assert best == {(p.kind, p.key) for p in parts.picks["x", "best"] + parts.picks["x", "worst"]}


def test_rows_of_a_large_set_are_sampled_and_its_counts_are_exact(tmp_path, monkeypatch):
    monkeypatch.setattr(report_units, "MOST_ROWS", 4)
    one, two = [answered("a", 3.0), failed("b", message="first")], [unread("c", 1.0, task="qa")]
    three = [answered("d", 0.5), answered("e", 0.5), failed("f", message="later"), failed("g", "TimeoutError", "slow")]
    output = write_set(tmp_path, one, two, three, [answered("h")])
    found = figures(output)
    assert found.sample == SampleSize(rows=3, units=2)
    assert [unit.rows for unit in found.units] == [2, 1, 4, 1]
    overall = found.overall
    assert (overall.rows, overall.errors, overall.retrieved) == (5, 3, 4)
    assert (overall.spreads["score"].values, overall.spreads["score"].mean) == (2, 2.0)
    assert {task: (g.rows, g.errors) for task, g in found.groups.items()} == {"(none)": (1, 1), "qa": (1, 0)}
    assert (found.answered, found.counts["engine_requests"], found.durations["seconds"].rows) == (2, 12, 2)
    assert found.failures == {
        ("ValueError", ALL_TASKS): Failure(2, "first"),
        ("TimeoutError", ALL_TASKS): Failure(1, "slow"),  # not in the sample
    }
    assert {pick.file.name for picks in found.picks.values() for pick in picks} == {
        f"part-{number:020x}.parquet" for number in (0, 1)
    }


def test_only_units_of_the_sample_are_opened(tmp_path, monkeypatch):
    output = write_set(tmp_path, *([answered(str(n)), failed(f"x{n}")] for n in range(5)))
    monkeypatch.setattr(report_units, "MOST_ROWS", 5)
    opened = []

    def read(file, names):
        opened.append(file.uri.removeprefix(f"{tmp_path}/"))
        return read_columns(file, names)

    monkeypatch.setattr(report_figures, "read_columns", read)
    monkeypatch.setattr(report_units, "read_columns", read)
    assert figures(output).sample == SampleSize(4, 2)
    assert sorted(opened) == [f"{folder}/part-{n:020x}.parquet" for folder in ("data", "errors") for n in (0, 1)]


def test_sample_of_a_run_at_work_counts_units_that_are_not_logged(tmp_path, monkeypatch):
    output = write_set(tmp_path, [answered("a")], [answered("b"), failed("c")], [unread("d")], finished=False)
    monkeypatch.setattr(report_units, "MOST_ROWS", 1)
    found = figures(output)
    overall = found.overall
    assert (found.sample, overall.rows, overall.errors, overall.retrieved) == (SampleSize(1, 1), 3, 1, 2)


def test_set_of_as_many_rows_as_are_read_is_not_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr(report_units, "MOST_ROWS", 3)
    found = figures(write_set(tmp_path, [answered("a"), failed("b")], [answered("c")]))
    assert (found.sample, found.answered, found.failures["ValueError", "(none)"].rows) == (None, 2, 1)
