import re
from pathlib import Path

import pytest

import pipeline.report.page
from pipeline.report.page import (
    Headline,
    format_amount,
    format_change,
    format_duration,
    format_fact,
    format_headline,
    format_number,
)

STYLE = Path(pipeline.report.page.__file__).with_name("report.css").read_text()


def colors(style: str) -> list[dict[str, str]]:
    """The variables of the light and the dark page."""
    return [
        dict(re.findall(r"--(\w+): (#\w{6});", block)) for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    ]


def luminance(color: str) -> float:
    """https://www.w3.org/TR/WCAG22/#dfn-relative-luminance"""
    parts = [int(color[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_texts_and_bars_have_wcag_aa_contrast(scheme):
    color = colors(STYLE)[scheme]
    for text in ("text", "quiet", "accent", "warn"):
        assert contrast(color[text], color["page"]) >= 4.5
    assert contrast(color["text"], color["mark"]) >= 4.5
    for line in ("bar", "line"):
        assert contrast(color[line], color["page"]) >= 3


@pytest.mark.parametrize(
    ("value", "unit", "words"),
    [
        (None, "rate", "–"),
        (1234567, "rows", "1,234,567"),
        (0.0, "share", "0.0 %"),
        (0.0000456, "share", "0.005 %"),
        (0.9996, "share", "99.960 %"),
        (0.756, "share", "75.6 %"),
        (12.3456, "rate", "12.3"),
        (0.0123, "rate", "0.0123"),
        (5432.1, "rate", "5,432"),
        (0.5, "score", "0.500"),
        (1234.5, "money", "1,234.50"),
        (0.00456, "money", "0.00456"),
        (75.0, "seconds", "1 min 15 s"),
    ],
)
def test_headlines_are_formatted_with_their_unit(value, unit, words):
    assert format_headline(value, unit) == words


@pytest.mark.parametrize(
    ("now", "before", "unit", "words"),
    [
        (0.5, 0.25, "share", "+25.0 points"),
        (1.0, 1.5, "score", "-0.500"),
        (150.0, 100.0, "rate", "+50.0 %"),
        (1.0, 0.0, "rate", "–"),
        (None, 1.0, "rate", "–"),
    ],
)
def test_differences_are_formatted_with_their_unit(now, before, unit, words):
    assert format_change(Headline("x", now, unit), Headline("x", before, unit)) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (None, "–"),
        (0.01234, "0.0123 s"),
        (61, "1 min 1 s"),
        (3540, "59 min 0 s"),
        (3660, "1 h 1 min"),
        (260_000, "3 d 0 h"),
    ],
)
def test_durations_are_formatted_for_readers(seconds, words):
    assert format_duration(seconds) == words


def test_facts_and_numbers_are_formatted_for_readers():
    assert [format_fact(value) for value in (True, False, 1.0, 21015324, 0.25, "half")] == [
        *("yes", "no", "1", "21,015,324", "0.25", "half")
    ]
    assert (format_number(-0.123456), format_number(float("inf"))) == ("-0.123", "inf")


def test_numbers_in_a_sample_are_shares():
    assert [format_amount(1234, 4936, sampled) for sampled in (False, True)] == ["1,234", "25.0 %"]
    assert format_amount(0, 0, sampled=True) == "–"
