from dataclasses import astuple, replace
from pathlib import Path

import pytest

from pipeline.config.sections import ExecutionConfig, StorageConfig
from pipeline.output.folder import OutputFolder
from pipeline.output.unit_files import UnitSummary
from pipeline.run.forecast import Between, Share, forecast_run, measure_pace, measure_start
from pipeline.storage.location import locate


def unit(
    began: float, full_until: float | None, ended: float, rows: int = 10, actor: str = "a", number: int = 0
) -> UnitSummary:
    return UnitSummary(
        f"{number:020x}",
        rows,
        {"ValueError": 1},
        retrieved=rows // 2,
        generated_tokens=30 * rows,
        prompt_tokens=900 * rows,
        began=began,
        ended=ended,
        full_until=full_until,
        actor=actor,
    )


@pytest.mark.parametrize(
    ("units", "low", "high"),
    [
        ([unit(100, 108, 110)], 1.0, 10 / 8),
        ([unit(100, 108, 110), unit(101, 118, 125)], 20 / 25, 20 / 18),
        ([unit(100, 108, 110), unit(500, 505, 510, actor="b")], 20 / 20, 20 / 13),  # one after the other
        ([unit(100, 108, 110, rows=40), unit(100, 118, 120, rows=20, actor="b")], 60 / 30, 60 / 26),
        ([unit(100, None, 110)], 1.0, None),
        ([unit(100, 104, 110), unit(100, None, 110)], 20 / 10, 20 / 4),
        ([unit(100, 104, 110), unit(100, None, 110, actor="b")], 20 / 20, 10 / 4),
        ([unit(100, 104, 110), unit(100, 101, 900, actor="")], 10 / 10, 10 / 4),  # resumed
    ],
)
def test_pace_lies_between_the_whole_time_and_that_of_a_full_engine(
    units: list[UnitSummary], low: float, high: float | None
) -> None:
    found = measure_pace(units)
    assert found is not None
    assert found.low == pytest.approx(low)
    assert found.high == (None if high is None else pytest.approx(high))


@pytest.mark.parametrize("units", [[], [UnitSummary("0" * 20, 10)], [replace(unit(100, 104, 110), ended=None)]])
def test_pace_without_times_is_unknown(units: list[UnitSummary]) -> None:
    assert measure_pace(units) is None


@pytest.mark.parametrize(
    ("count", "rows", "low", "high"),
    [
        (0, 200, 0.0, 1 - 0.025 ** (1 / 200)),
        (200, 200, 0.025 ** (1 / 200), 1.0),
        (5, 10, 0.18709, 0.81291),  # Clopper and Pearson 1934, as in R's binom.test(5, 10)
    ],
)
def test_share_has_its_exact_interval(count: int, rows: int, low: float, high: float) -> None:
    share = Share.of(count, rows)
    assert (share.value, share.low, share.high) == (count / rows, pytest.approx(low, 1e-4), pytest.approx(high, 1e-4))


@pytest.mark.parametrize(
    ("started", "expected"),
    [("1970-01-01T00:00:40+00:00", 60.0), ("1970-01-01T00:02:00+00:00", None), (None, None)],
)
def test_start_is_known_unless_the_run_was_interrupted(started: str | None, expected: float | None) -> None:
    assert measure_start({"started": started}, [unit(100, 109, 110)]) == expected


def finished(folder: Path, *units: UnitSummary) -> OutputFolder:
    output = OutputFolder(locate(str(folder), StorageConfig()))
    output.finish({"started": "1970-01-01T00:00:40+00:00"}, units)
    return output


def test_forecast_is_worked_out_by_hand(tmp_path: Path) -> None:
    source = finished(tmp_path, unit(100, 107, 110), unit(101, 108, 110, number=1))
    found = forecast_run(source, 72_000, ExecutionConfig(actors=2, price_per_hour=1.5))
    slow, fast = 2 * 20 / 10, 2 * 20 / 8
    assert found.rows_per_second == Between(slow, fast)
    assert found.start_seconds == 60.0
    shortest, longest = (60 + 72_000 / 5) / 3600, (60 + 72_000 / 4) / 3600
    assert astuple(found)[6:8] == (pytest.approx((shortest, longest)), pytest.approx((3 * shortest, 3 * longest)))
    assert (found.errors.value, found.retrieved and found.retrieved.value) == (0.1, pytest.approx(10 / 18))
    assert (found.prompt_tokens, found.generated_tokens) == (pytest.approx(1000), pytest.approx(600 / 18))
    assert found.describe() == [
        f"forecast for 72000 rows on 2 actor(s), from 20 rows of {tmp_path}:",
        "speed    4.00 to 5.00 rows/s in the steady state after a start of 60 s",
        "time     4.0 to 5.0 h",
        "cost     12.05 to 15.05",
        "errors   7200 rows (889 to 22823, 95 % interval)",
        "passages used by 55.6% of the answered rows (30.8% to 78.5%)",
        "tokens   1000 in prompts and 33 generated per row",
    ]


def test_forecast_from_engines_that_were_never_full_has_one_bound(tmp_path: Path) -> None:
    found = forecast_run(finished(tmp_path, unit(100, None, 110)), 600, ExecutionConfig(price_per_hour=36))
    assert found.describe()[1:5] == [
        "speed    at least 1.00 rows/s in the steady state after a start of 60 s",
        "time     at most 11.0 min",
        "cost     at most 6.60",
        "no request waited for an engine, so larger samples may be faster; take more rows",
    ]


def test_forecast_without_times_says_so(tmp_path: Path) -> None:
    found = forecast_run(finished(tmp_path, UnitSummary("0" * 20, 3, {"KeyError": 3})), 9, ExecutionConfig())
    assert found.describe()[1:] == [
        "speed    unknown: the set has no times",
        "errors   9 rows (3 to 9, 95 % interval)",
    ]


def test_unfinished_set_gives_no_forecast(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a finished annotated set"):
        forecast_run(OutputFolder(locate(str(tmp_path), StorageConfig())), 9, ExecutionConfig())
