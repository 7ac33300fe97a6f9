import dataclasses

import pyarrow as pa
import pytest

from pipeline.config.sections import Columns
from pipeline.output.unit_files import UnitSummary
from pipeline.report import changes as report_changes
from pipeline.report import units as report_units
from pipeline.report.changes import (
    Answers,
    ChangedAnswer,
    Changes,
    choose_sampling_interval,
    compare_answers,
    has_own_answers,
    hash_answers,
    read_answers,
    read_changed_answers,
)
from tests.support.reports import answered, failed, write_set


def answers(sample: int = 1, **by_id: str | None) -> Answers:
    return hash_answers(
        pa.chunked_array([list(by_id)]), pa.chunked_array([pa.array(by_id.values(), pa.string())]), sample
    )


def test_answers_are_compared_by_id_across_files():
    ours = [answers(a="Paris", b="Rome"), answers(c="x", d="only ours", e=None)]
    theirs = [answers(c="y"), answers(b="Rome", a="Paris.", e=None, f="only theirs")]
    assert compare_answers(ours, theirs, 1) == Changes(shared=4, changed=2, sample=1)


def test_disjoint_sets_share_no_answers():
    assert compare_answers([answers(a="x")], [answers(b="x")], 1) == Changes(0, 0, 1)
    assert compare_answers([], [], 1) == Changes(0, 0, 1)


def test_large_sets_are_compared_on_a_sample_of_ids(monkeypatch):
    monkeypatch.setattr(report_changes, "MOST_COMPARED", 1000)
    sample = choose_sampling_interval({"queries": {"rows": 8000}}, {"queries": {"rows": 5}})
    assert sample == 8
    ours = {f"q{n}": "a" for n in range(8000)}
    theirs = {f"q{n}": "a" if n % 4 else "b" for n in reversed(range(8000))}
    found = compare_answers([answers(sample, **ours)], [answers(sample, **theirs)], sample)
    assert 800 < found.shared < 1200  # one in eight
    assert 0.2 < found.changed / found.shared < 0.3


def test_sets_up_to_four_million_rows_are_compared_completely():
    assert choose_sampling_interval({"queries": {"rows": 4_000_000}}, {}) == 1
    assert choose_sampling_interval({}, {"queries": {"rows": 4_000_001}}) == 2


def test_answers_of_all_units_are_read_however_large_the_set(tmp_path, monkeypatch):
    monkeypatch.setattr(report_units, "MOST_ROWS", 1)
    ours = write_set(tmp_path / "a", [answered("a")], [answered("b"), failed("c")], [answered("d")])
    theirs = write_set(tmp_path / "b", [answered("d", answer="x"), answered("b"), answered("c")], [answered("a")])
    assert compare_answers(read_answers(ours, "id", 1), read_answers(theirs, "id", 1), 1) == Changes(3, 1, 1)


def test_column_missing_for_a_comparison_is_named(tmp_path):
    output = write_set(tmp_path, [answered("a")])
    with pytest.raises(ValueError, match=r"part-0+\.parquet: no column 'key'"):
        read_answers(output, "key", 1)


def test_some_changed_answers_are_read(tmp_path, monkeypatch):
    ours = write_set(tmp_path / "a", [answered("a"), answered("b", answer="new")], [answered("c", answer="other")])
    theirs = write_set(tmp_path / "b", [answered("b", answer="old"), answered("d")], [answered("c", answer="x")])
    first = ChangedAnswer("b", answered("b")["query"], "old", "new")
    second = ChangedAnswer("c", answered("c")["query"], "x", "other")
    assert read_changed_answers(ours, theirs, Columns()) == [first, second]
    monkeypatch.setattr(report_changes, "MOST_SHOWN", 1)
    assert read_changed_answers(ours, theirs, Columns()) == [first]
    assert read_changed_answers(ours, write_set(tmp_path / "c", []), Columns()) == []


def test_units_that_were_carried_over_whole_have_no_changes():
    summary = UnitSummary("u", rows=5, errors={"ValueError": 1}, carried=3)
    assert has_own_answers(summary)
    assert not has_own_answers(dataclasses.replace(summary, carried=4))
