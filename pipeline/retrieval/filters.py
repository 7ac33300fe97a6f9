"""Finds the passages that a condition holds for: an SQL expression, which DuckDB evaluates."""

from functools import cache, cached_property
from typing import Any

import duckdb
import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa

# The column of row numbers beside those of the passages.
ROW = "_row"


class FilterError(ValueError):
    """A condition that is no SQL expression, or does not fit the columns of the passages."""


class RowSelection:
    """The passages of a shard that a search is restricted to.

    Args:
        kept: whether the passage of each row is among them, bool [rows].
    """

    def __init__(self, kept: npt.NDArray[np.bool_]) -> None:
        self.rows = len(kept)
        self.count = int(kept.sum())
        self._bits = np.packbits(kept, bitorder="little")

    @property
    def mask(self) -> npt.NDArray[np.bool_]:
        """Whether each row is kept, bool [rows]."""
        return np.unpackbits(self._bits, count=self.rows, bitorder="little").astype(bool)

    @cached_property
    def selector(self) -> Any:
        """FAISS's selector of the rows, which refers to the memory of this object."""
        create: Any = faiss.IDSelectorBitmap  # its type stub has the arguments of C++
        return create(self._bits)


def select_rows(condition: str, passages: pa.Table) -> RowSelection:
    """Select the rows that a condition holds for; it does not hold where it is null.

    Args:
        condition: an SQL expression over the columns of the passages, such as ``lang = 'en' and year >= 2020``.
        passages: the passages of a shard, or their columns that conditions may name.

    Raises:
        FilterError: the condition is no expression, names an unknown column, compares other types or is no condition.
    """
    rows = passages.append_column(ROW, pa.array(np.arange(len(passages))))
    try:
        relation = _connect().cursor().from_arrow(rows)
        expression = duckdb.SQLExpression(condition)
        (kind,) = relation.select(expression).types
        if kind != "BOOLEAN":
            raise FilterError(f"filter {condition!r}: it is {kind}, not a condition such as year >= 2020")
        found = relation.filter(expression).select(ROW).fetchnumpy()[ROW]
    except duckdb.Error as error:
        columns = ", ".join(f"{field.name} ({field.type})" for field in passages.schema)
        raise FilterError(f"filter {condition!r}: {_get_reason(error)}; passages have {columns}") from None
    kept = np.zeros(len(passages), bool)
    kept[found] = True
    return RowSelection(kept)


def check_condition(condition: str, columns: pa.Schema) -> None:
    """Check a condition against the columns of an index, before its passages are read.

    Raises:
        FilterError: as :func:`select_rows`.
    """
    # Constants are converted to the types of columns only if there is a row.
    select_rows(condition, pa.Table.from_pylist([dict.fromkeys(columns.names)], schema=columns))


def join_conditions(*conditions: str | None) -> str | None:
    """Join conditions, all of which must hold; None if there are none."""
    given = [condition for condition in conditions if condition]
    # On lines of their own, since a condition may end in a comment.
    return " and ".join(f"({condition}\n)" for condition in given) if len(given) > 1 else next(iter(given), None)


def _get_reason(error: duckdb.Error) -> str:
    return str(error).partition("\n")[0].partition("Error: ")[2] or str(error)


@cache
def _connect() -> duckdb.DuckDBPyConnection:
    """Connect to a database without tables that reads no files and loads no extensions."""
    connection = duckdb.connect(":memory:")
    for setting in ("threads = 1", "enable_external_access = false", "lock_configuration = true"):
        connection.execute(f"set {setting}")
    return connection
