"""Rows of a source, in Python as text files hold them or in Arrow as Parquet and Hugging Face datasets do.

Only the columns that become columns of the query set are converted in Python; the others pass, in Arrow without any
conversion, since Python holds neither nanoseconds nor years above 9999.
"""

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa

from pipeline.queries.converters import ColumnMapping
from pipeline.queries.schema import Row, read_rows
from pipeline.storage.location import join_lines

# Errors that pyarrow raises for values that do not fit a type, or each other.
UNFIT = (pa.ArrowException, TypeError, ValueError, OverflowError)


@dataclass(frozen=True)
class SourceRow:
    """A row of a source.

    Attributes:
        place: file and row number, from 0, for messages.
        values: values by column; empty if the row cannot be read.
        problem: reason why the row cannot be read.
    """

    place: str
    values: Mapping[str, Any] = field(default_factory=dict)
    problem: str | None = None


class SourceBatch(Protocol):
    """Some consecutive rows of a source."""

    @property
    def place(self) -> str:
        """File and number of the first row, from 0, for messages."""
        ...

    def list_columns(self) -> list[str]:
        """List the columns of the rows."""
        ...

    def read_rows(self, mapping: ColumnMapping) -> list[SourceRow]:
        """Read all rows, with at least the columns that a mapping reads."""
        ...

    def pass_columns(self, mapping: ColumnMapping, numbers: Sequence[int]) -> pa.Table:
        """Return the columns that pass a mapping unchanged, of the rows with these numbers in the batch.

        Raises:
            ValueError: the values of a column have no common type; names the column and the row.
        """
        ...


@dataclass(frozen=True)
class PythonBatch:
    """Rows of a text file; the types of its columns are inferred."""

    rows: Sequence[SourceRow]

    @property
    def place(self) -> str:
        """File and number of the first row."""
        return self.rows[0].place

    def list_columns(self) -> list[str]:
        """List the columns of the rows."""
        return list(dict.fromkeys(name for row in self.rows for name in row.values))

    def read_rows(self, mapping: ColumnMapping) -> list[SourceRow]:  # noqa: ARG002
        """Read all rows, with all columns."""
        return list(self.rows)

    def pass_columns(self, mapping: ColumnMapping, numbers: Sequence[int]) -> pa.Table:
        """Return the columns that pass, as :class:`SourceBatch` says."""
        rows = [self.rows[number] for number in numbers]
        return pa.table({name: _build_array(name, rows) for name in self.list_columns() if mapping.passes(name)})


@dataclass(frozen=True)
class ArrowBatch:
    """Rows of a table.

    Attributes:
        file: file of the rows, for messages.
        first: number of the first row in the file, from 0.
        table: the rows.
    """

    file: str
    first: int
    table: pa.Table

    @property
    def place(self) -> str:
        """File and number of the first row."""
        return self._locate_row(0)

    def _locate_row(self, number: int) -> str:
        return f"{self.file} row {self.first + number}"

    def list_columns(self) -> list[str]:
        """List the columns of the rows."""
        return list(self.table.column_names)

    def read_rows(self, mapping: ColumnMapping) -> list[SourceRow]:
        """Read all rows, with the columns that the mapping reads; rows with text that is not UTF-8 have a problem."""
        read = pa.schema([mapping.select_fields(field) for field in self.table.schema if mapping.reads(field.name)])
        values = read_rows(self.table.select(read.names).cast(read)) if read else [{}] * self.table.num_rows
        used = [name for name in self.list_columns() if mapping.reads(name) or mapping.passes(name)]
        problems = find_invalid_rows(self.table.select(used))
        return [_build_row(self._locate_row(n), problems.get(n, row)) for n, row in enumerate(values)]

    def pass_columns(self, mapping: ColumnMapping, numbers: Sequence[int]) -> pa.Table:
        """Return the columns that pass, as :class:`SourceBatch` says."""
        return self.table.select([name for name in self.list_columns() if mapping.passes(name)]).take(numbers)


def _build_row(place: str, row: Row) -> SourceRow:
    return SourceRow(place, problem=str(row)) if isinstance(row, ValueError) else SourceRow(place, row)


def find_invalid_rows(table: pa.Table) -> dict[int, ValueError]:
    """Find rows that are not valid Arrow, such as text that is not UTF-8; returns the error by row number."""
    if _find_error(table) is None:
        return {}
    errors = {number: _find_error(table.slice(number, 1)) for number in range(table.num_rows)}
    return {number: error for number, error in errors.items() if error is not None}


def _find_error(table: pa.Table) -> ValueError | None:
    for name in table.column_names:
        try:
            for chunk in table[name].chunks:
                chunk.validate(full=True)
        except pa.ArrowInvalid as error:
            return ValueError(f"column {name!r} is not valid: {join_lines(error)}")
    return None


def _build_array(name: str, rows: Sequence[SourceRow]) -> pa.Array:
    values = [row.values.get(name) for row in rows]
    try:
        return pa.array(values)
    except UNFIT as error:
        first = bisect.bisect_left(range(len(values)), True, key=lambda n: not _can_convert(values[: n + 1]))
        raise ValueError(
            f"{rows[first].place}: column {name!r} fits no type, or not that of the rows before it "
            f"({join_lines(error)}); leave it out with --drop {name}"
        ) from None


def _can_convert(values: Sequence[Any]) -> bool:
    try:
        pa.array(values)
    except UNFIT:
        return False
    return True
