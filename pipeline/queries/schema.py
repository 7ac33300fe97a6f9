"""Check the columns of a query set, and convert its rows to queries."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from pipeline.config.sections import Columns
from pipeline.decoding.types import Passage, Query
from pipeline.output.schema import rename_reserved_columns


def _is_text(kind: pa.DataType) -> bool:
    """Whether a column or an inner field holds text; a null type stands for text that is missing throughout."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    texts = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return bool(texts or pa.types.is_null(kind))


def _is_list(kind: pa.DataType) -> bool:
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_list_view(kind)
    return bool(lists or pa.types.is_fixed_size_list(kind))


def _is_passages(kind: pa.DataType) -> bool:
    if not _is_list(kind):
        return False
    if pa.types.is_null(kind.value_type):
        return True
    if not pa.types.is_struct(kind.value_type):
        return False
    fields = {field.name: field.type for field in kind.value_type}
    return {"id", "text"} <= fields.keys() and all(_is_text(fields[n]) for n in ("id", "title", "text") if n in fields)


def _is_texts(kind: pa.DataType) -> bool:
    return _is_list(kind) and _is_text(kind.value_type)


def _is_text_sets(kind: pa.DataType) -> bool:
    return _is_list(kind) and (pa.types.is_null(kind.value_type) or _is_texts(kind.value_type))


# Other columns pass through.
QUERY_FIELDS = pa.schema(
    [
        pa.field("id", pa.string()),
        pa.field("query", pa.string()),
        pa.field("input", pa.string()),
        pa.field("task", pa.string()),
        pa.field("choices", pa.list_(pa.string())),
        pa.field("filter", pa.string()),
        pa.field("answers", pa.list_(pa.string())),
        pa.field("short_answers", pa.list_(pa.list_(pa.string()))),
        pa.field("gold_passage_id", pa.string()),
        pa.field("passages", pa.list_(pa.struct([(name, pa.string()) for name in ("id", "title", "text")]))),
    ]
)


TypeCheck = tuple[Callable[[pa.DataType], bool], str]


# Columns that the evaluation reads.
GOLD_TYPES: Mapping[str, TypeCheck] = {
    "answers": (_is_texts, "list<string>"),
    "short_answers": (_is_text_sets, "list<list<string>>"),
    "gold_passage_id": (_is_text, "string"),
}


def check_types(schema: pa.Schema, wanted: Mapping[str, TypeCheck], source: str) -> None:
    """Check the types of columns; missing columns, and columns of Arrow's null type, pass.

    Args:
        schema: schema to check.
        wanted: test of the type, and its name for messages, by column.
        source: URI of the file, for messages.

    Raises:
        ValueError: a column has another type.
    """
    for column, (fits, name) in wanted.items():
        if column in schema.names and not pa.types.is_null(kind := schema.field(column).type) and not fits(kind):
            raise ValueError(f"{source}: column {column!r} is {kind}, expected {name}")


def check_query_schema(schema: pa.Schema, columns: Columns, source: str) -> None:
    """Check the columns of a query set.

    Args:
        schema: schema of a file.
        columns: names of the columns.
        source: URI of the file, for messages.

    Raises:
        ValueError: a column is missing or of the wrong type, or two have the same name or would have it in the output.
    """
    for column in (columns.id, columns.query):
        if column not in schema.names:
            raise ValueError(
                f"{source}: no column {column!r}; it has {', '.join(schema.names) or 'none'} "
                "(columns can be mapped: --set columns.query=NAME)"
            )
    check_readable(schema, source)
    wanted: dict[str, TypeCheck] = {
        columns.id: (_is_text, "string"),
        columns.query: (_is_text, "string"),
        columns.input: (_is_text, "string"),
        columns.task: (_is_text, "string"),
        columns.choices: (_is_texts, "list<string>"),
        columns.filter: (_is_text, "string"),
        columns.passages: (_is_passages, "list<struct<id: string, title: string, text: string>>"),
        **GOLD_TYPES,
    }
    check_types(schema, wanted, source)
    _check_output_names(schema, source)


def check_readable(schema: pa.Schema, source: str) -> None:
    """Check that pyarrow can read the columns of a file by name.

    Raises:
        ValueError: two columns have one name, or a type cannot be read; names the column.
    """
    for name, count in Counter(schema.names).items():
        if count > 1:
            raise ValueError(f"{source}: {count} columns are named {name!r}; rename all but one")
    for field in schema:
        if "large_list_view" in str(field.type):  # at any depth
            kind = f"column {field.name!r} is {field.type}"
            raise ValueError(f"{source}: {kind}, which pyarrow cannot read; use large_list")


def _check_output_names(schema: pa.Schema, source: str) -> None:
    """Reject a column that would get the same name in the output as another one; case does not count."""
    outputs = dict(zip(schema.names, rename_reserved_columns(schema).names, strict=True))
    for name, output in outputs.items():
        others = [other for other in outputs if other != name and outputs[other].casefold() == output.casefold()]
        if name != output and others:
            raise ValueError(f"{source}: columns {name!r} and {others[0]!r} would both be written as {output!r}")


# What Python raises for text that is not UTF-8, for dates and times beyond its range, and for unknown time zones.
UNREADABLE = (ValueError, OverflowError, KeyError)
Row = dict[str, Any] | ValueError


def read_rows(table: pa.Table) -> list[Row]:
    """Convert a table to rows; a row with a value that Python cannot read is replaced by an error that says so."""
    try:
        return list(table.to_pylist())
    except UNREADABLE:
        return [_read_row(table.slice(n, 1)) for n in range(table.num_rows)]


def _read_row(table: pa.Table) -> Row:
    row = {}
    for name in table.column_names:
        try:
            (row[name],) = table[name].to_pylist()
        except UnicodeDecodeError as error:
            return ValueError(f"column {name!r} is not UTF-8: {error}")
        except UNREADABLE as error:
            return ValueError(f"column {name!r} has a value that cannot be read: {error}")
    return row


def to_query(row: Mapping[str, Any], columns: Columns) -> Query:
    """Convert an input row to a query; a missing column is treated as null.

    Raises:
        ValueError: a choice is null, a given passage is null or has no id, or two have the same id.
    """
    given = row.get(columns.passages)
    choices = tuple(row.get(columns.choices) or ())
    if None in choices:
        raise ValueError("a choice is null")
    passages = _to_passages(given) if given else None
    return Query(
        id=row[columns.id],
        query=row[columns.query] or "",
        input=row.get(columns.input),
        task=row.get(columns.task),
        choices=choices,
        passages=passages,
        filter=(row.get(columns.filter) or "").strip() or None,
    )


def _to_passages(rows: Sequence[Mapping[str, Any] | None]) -> tuple[Passage, ...]:
    """Convert given passages.

    Raises:
        ValueError: a passage is null or has no id, or two have the same id.
    """
    passages: dict[str, Passage] = {}
    for place, row in enumerate(rows):
        if row is None or row["id"] is None:
            raise ValueError(f"given passage {place} is null or has no id")
        if row["id"] in passages:
            raise ValueError(f"two given passages have the id {row['id']!r}")
        passages[row["id"]] = Passage(row["id"], row.get("title") or "", row["text"] or "")
    return tuple(passages.values())
