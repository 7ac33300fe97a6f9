"""Divide the files of a query set into units."""

import math
from collections.abc import Iterator, Sequence
from itertools import chain

from pipeline.queries.inspection import QueryFile
from pipeline.queries.units import Part, Unit

# Rows of the units of a set of up to a million rows: small enough that many actors share a small set.
FEWEST_UNIT_ROWS = 256
# Larger sets are divided into this many units, whose rows grow with the set,
MANY_UNITS = 4_000
# until a unit has this many rows, hours of work. Then there are more units,
MOST_UNIT_ROWS = 8_192
# but at most this many: a driver lists, counts and reports them, and every unit is a file.
MOST_UNITS = 20_000


def choose_unit_rows(files: Sequence[int]) -> int:
    """Choose the number of rows of a unit for files of these numbers of rows; the same for the same files."""
    rows = sum(files)
    chosen = min(max(math.ceil(rows / MANY_UNITS), FEWEST_UNIT_ROWS), MOST_UNIT_ROWS)
    chosen = max(chosen, math.ceil(rows / MOST_UNITS))
    while count_units(files, chosen) > MOST_UNITS:
        chosen += chosen // 10  # files that are a little larger than a unit make two each
    return chosen


def count_units(files: Sequence[int], unit_rows: int) -> int:
    """Count the units into which :func:`divide_files` divides files of these numbers of rows."""
    units, room = 0, 0
    for rows in files:
        if rows > unit_rows:
            units, room = units + math.ceil(rows / unit_rows), 0
        elif rows > room:
            units, room = units + 1, unit_rows - rows
        else:
            room -= rows
    return units


def divide_files(files: Sequence[QueryFile], unit_rows: int) -> Iterator[Unit]:
    """Divide files into units of at most ``unit_rows`` rows, in the order of files and rows.

    Consecutive files share a unit that holds all their rows; no other unit has rows of two files.
    """
    waiting: list[Part] = []
    room = 0
    for file in files:
        if waiting and file.rows > room:
            yield Unit.join(waiting)
            waiting = []
        if file.rows > unit_rows:
            yield from map(Unit.join, file.divide(unit_rows))
            continue
        room = (room if waiting else unit_rows) - file.rows
        waiting += chain.from_iterable(file.divide(unit_rows))
    if waiting:
        yield Unit.join(waiting)
