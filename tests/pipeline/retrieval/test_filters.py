import datetime as dt

import numpy as np
import pyarrow as pa
import pytest

from pipeline.retrieval.filters import FilterError, RowSelection, check_condition, select_rows

PASSAGES = pa.table(
    {
        "id": ["a", "b", "c", "d"],
        "title": ["Iron", "Gold", "Iron", ""],
        "language": ["en", "de", "en", None],
        "year": pa.array([2019, 2020, None, 2024], pa.int64()),
        "weight": [0.5, 1.5, 2.5, None],
        "open": [True, False, None, True],
        "day": [dt.date(2020, 1, 1), None, dt.date(2021, 1, 1), dt.date(2024, 2, 29)],
        "tags": pa.array([["x"], ["y", "z"], [], None], pa.list_(pa.string())),
    }
)


def select(condition: str) -> str:
    """The ids of the passages that a condition selects."""
    return "".join(np.array(PASSAGES["id"])[select_rows(condition, PASSAGES).mask])


@pytest.mark.parametrize(
    ("condition", "ids"),
    [
        ("language = 'en'", "ac"),
        ("language = 'en' and year >= 2019", "a"),
        ("year >= 2020", "bd"),
        ("not year >= 2020", "a"),
        ("year is null", "c"),
        ("year = '2020'", "b"),
        ("weight between 1 and 3", "bc"),
        ("open", "ad"),
        ("not open", "b"),
        ("day > '2020-06-01'", "cd"),
        ("day >= date '2024-02-29'", "d"),
        ("'y' in tags", "b"),
        ("len(tags) = 0", "c"),
        ("title = 'Iron' and id <> 'a'", "c"),
        ("title like 'G%' or language is null", "bd"),
        ("id in ('a', 'd')", "ad"),
        ("id = 'a' -- the first", "a"),
        ("true", "abcd"),
        ("1 = 0", ""),
    ],
)
def test_condition_selects_the_rows_it_holds_for(condition: str, ids: str) -> None:
    check_condition(condition, PASSAGES.schema)
    assert select(condition) == ids


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("lang = 'en'", r'Referenced column "lang" not found .* passages have id \(string\), .*year \(int64\)'),
        ("year >= 'soon'", "Could not convert string 'soon' to INT64"),
        ("day >= 'soon'", "invalid date"),
        ("language > 3", "Cannot compare values of type VARCHAR and type INTEGER"),
        ("year", "it is BIGINT, not a condition"),
        ("null", "not a condition"),
        ("year >", "syntax error"),
        ("", r"filter ''"),
        ("true) or (true", "syntax error"),
        ("year = 1 /* x", "unterminated|syntax error"),
        ("columns(*) is not null", "it is BOOLEAN, BOOLEAN, .*, not a condition"),
        ("_row = 1", 'column "_row" not found'),
        ("  ", r"filter '  '"),
        ("open; drop table x", "more than one statement"),
        ("open limit 1", "holds a modifier"),
        ("sum(year) > 1", "cannot contain aggregates"),
        ("row_number() over () > 1", "cannot contain window functions"),
        ("exists (select * from read_csv('/etc/passwd'))", "file system operations are disabled"),
        ("exists (select * from read_text('https://example.com'))", "disabled|not found"),
    ],
)
def test_other_conditions_are_refused_in_one_line(condition: str, message: str) -> None:
    for check in (lambda: check_condition(condition, PASSAGES.schema), lambda: select(condition)):
        with pytest.raises(FilterError, match=message) as caught:
            check()
        assert "\n" not in str(caught.value)
        assert repr(condition) in str(caught.value)


def test_condition_that_takes_too_long_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.retrieval.filters.LONGEST_S", 0.2)
    endless = "(select count(*) from range(100000000) a, range(100000000) b where a.range + b.range = year) > 0"
    with pytest.raises(FilterError, match=r"took longer than 0\.2 s"):
        select(endless)


def test_selection_keeps_a_bit_for_each_row() -> None:
    kept = np.arange(21) % 3 == 0
    selection = RowSelection(kept)
    assert (selection.rows, selection.count) == (21, 7)
    assert selection.mask.tolist() == kept.tolist()


def test_selections_intersect() -> None:
    one, two = RowSelection(np.arange(12) % 2 == 0), RowSelection(np.arange(12) % 3 == 0)
    assert np.flatnonzero(one.intersect(two).mask).tolist() == [0, 6]
    assert one.intersect(None) is one
