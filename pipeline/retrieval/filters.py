"""Finds the passages that a condition holds for: an SQL expression, which DuckDB evaluates."""

import threading
from functools import cache, cached_property
from typing import Any

import duckdb
import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa

# Conditions, all of which must hold.
Conditions = tuple[str, ...]
# Seconds that the evaluation of a condition on a shard may take. A simple one takes some 30 ms for a million passages.
LONGEST_S = 60.0


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

    @classmethod
    def without(cls, rows: int, removed: npt.NDArray[np.int64]) -> "RowSelection":
        """Return the selection of all rows but some, int64 [removed]."""
        kept = np.ones(rows, bool)
        kept[removed] = False
        return cls(kept)

    def intersect(self, other: "RowSelection | None") -> "RowSelection":
        """Return the selection of the rows that another one keeps, too; all if there is none."""
        return self if other is None else RowSelection(self.mask & other.mask)

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
        FilterError: the condition is no expression, names an unknown column, compares other types, is no condition, or
            takes too much time or memory.
    """
    cursor = _connect().cursor()
    alarm = threading.Timer(LONGEST_S, cursor.interrupt)
    alarm.start()
    try:
        return RowSelection(_evaluate(condition, cursor.from_arrow(passages)))
    except duckdb.InterruptException:
        raise FilterError(f"filter {condition!r}: took longer than {LONGEST_S:g} s") from None
    except duckdb.Error as error:
        columns = ", ".join(f"{field.name} ({field.type})" for field in passages.schema)
        raise FilterError(f"filter {condition!r}: {_get_reason(error)}; passages have {columns}") from None
    finally:
        alarm.cancel()


def _evaluate(condition: str, passages: Any) -> npt.NDArray[np.bool_]:
    expression = duckdb.SQLExpression(condition)
    passages.filter(expression)  # refuses aggregates and window functions, without being executed
    kept = passages.select(expression.alias("kept"))
    if kept.types != ["BOOLEAN"]:
        kinds = ", ".join(map(str, kept.types))
        raise FilterError(f"filter {condition!r}: it is {kinds}, not a condition such as year >= 2020")
    found = kept.fetchnumpy()["kept"]
    return np.ma.filled(found, False)


def check_condition(condition: str, columns: pa.Schema) -> None:
    """Check a condition against the columns of an index, before its passages are read.

    Raises:
        FilterError: as :func:`select_rows`.
    """
    # Constants are converted to the types of columns only if there is a row.
    select_rows(condition, pa.Table.from_pylist([dict.fromkeys(columns.names)], schema=columns))


def _get_reason(error: duckdb.Error) -> str:
    return str(error).partition("\n")[0].partition("Error: ")[2] or str(error)


@cache
def _connect() -> duckdb.DuckDBPyConnection:
    """Connect to a database without tables that reads no files, writes none and loads no extensions."""
    connection = duckdb.connect(":memory:")
    # One thread keeps the rows in their order.
    settings = ("threads = 1", "memory_limit = '1GB'", "temp_directory = ''", "enable_external_access = false")
    for setting in (*settings, "lock_configuration = true"):
        connection.execute(f"set {setting}")
    return connection
