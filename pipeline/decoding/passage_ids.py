"""Ids of the parts that a long passage is split into."""

_MARK = "#"
# Matches the end of a part's id that its passage's id lacks.
PART_NUMBER = rf"{_MARK}[0-9]+$"


def name_parts(passage_id: str, parts: int) -> list[str]:
    """Return the ids of a passage's parts: ``id#1``, ``id#2``, …; that of a passage in one part is unchanged."""
    return [passage_id] if parts == 1 else [f"{passage_id}{_MARK}{number}" for number in range(1, parts + 1)]


def is_passage_or_part(found: str, passage_id: str) -> bool:
    """Whether an id is that of a passage or of one of its parts."""
    whole, _, number = found.rpartition(_MARK)
    return found == passage_id or (whole == passage_id and number.isdecimal() and number.isascii())
