import pytest

from pipeline.decoding.passage_ids import is_passage_or_part, name_parts


@pytest.mark.parametrize(
    ("passage_id", "parts", "expected"),
    [
        ("a", 1, ["a"]),
        ("a", 3, ["a#1", "a#2", "a#3"]),
        ("a#2", 1, ["a#2"]),
        ("a#2", 2, ["a#2#1", "a#2#2"]),
        ("", 2, ["#1", "#2"]),
    ],
)
def test_parts_are_named_by_passage_and_number(passage_id: str, parts: int, expected: list[str]) -> None:
    assert name_parts(passage_id, parts) == expected
    assert all(is_passage_or_part(name, passage_id) for name in expected)


@pytest.mark.parametrize(
    ("found", "passage_id", "expected"),
    [
        ("a", "a", True),
        ("a#12", "a", True),
        ("a#2", "a#2", True),
        ("a#2#1", "a#2", True),
        ("a#2#1", "a", False),
        ("a", "a#1", False),
        ("a#3", "a#2", False),
        ("a#", "a", False),
        ("a#x", "a", False),
        ("a#1x", "a", False),
        ("a#²", "a", False),
        ("ab#1", "a", False),
        ("#1", "", True),
        ("", "", True),
    ],
)
def test_part_belongs_to_its_own_passage_only(found: str, passage_id: str, expected: bool) -> None:
    assert is_passage_or_part(found, passage_id) is expected
