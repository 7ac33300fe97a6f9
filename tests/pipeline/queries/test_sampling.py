import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.sections import ExecutionConfig, SampleConfig
from pipeline.queries.sampling import choose_sample_unit_rows, keep_sample

Parts = list[list[bool]]


def draw(parts: Parts, rows: int, seed: int = 0) -> list[int]:
    """Places of the rows that stay."""
    wanted = np.array([row for part in parts for row in part], bool)
    keep_sample(wanted, map(len, parts), SampleConfig(rows=rows, seed=seed))
    return [int(place) for place in np.flatnonzero(wanted)]


@given(st.lists(st.lists(st.booleans(), max_size=9), max_size=6), st.integers(1, 12), st.integers(0, 3))
def test_sample_has_one_row_of_each_stretch_of_the_wanted_rows(parts: Parts, rows: int, seed: int) -> None:
    wanted = [place for place, row in enumerate(row for part in parts for row in part) if row]
    drawn = draw(parts, rows, seed)
    assert len(drawn) == min(rows, len(wanted))
    assert set(drawn) <= set(wanted)
    if len(drawn) == rows:
        ends = [n * len(wanted) // rows for n in range(rows + 1)]
        assert all(one in wanted[ends[n] : ends[n + 1]] for n, one in enumerate(drawn))
    assert draw([[row] for part in parts for row in part], rows, seed) == drawn  # however the rows are divided


def test_every_file_has_its_share() -> None:
    drawn = np.array(draw([[True] * 600, [True] * 300, [True] * 100], 100))
    assert [int(np.sum((drawn >= low) & (drawn < high))) for low, high in [(0, 600), (600, 900), (900, 1000)]] == [
        60,
        30,
        10,
    ]


def test_seed_decides_the_sample() -> None:
    parts = [[True] * 1000]
    assert draw(parts, 50, 1) == draw(parts, 50, 1) != draw(parts, 50, 2)


def test_without_a_sample_all_rows_stay() -> None:
    wanted = np.array([True, False, True])
    keep_sample(wanted, [3], SampleConfig())
    assert wanted.tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("rows", "settings", "expected"),
    [
        (200, {}, 67),
        (200, {"actors": 4}, 17),
        (5, {"actors": 4}, 1),
        (20_000, {}, 256),
        (200, {"unit_rows": 10}, 10),
        (200, {"units_in_flight": 1}, 200),
    ],
)
def test_units_of_a_sample_keep_all_actors_busy(rows: int, settings: dict[str, int], expected: int) -> None:
    assert choose_sample_unit_rows(rows, ExecutionConfig.model_validate(settings)) == expected
