"""Unify the schemas of a query set's files, which writers let drift, as far as no value changes."""

from collections.abc import Mapping

import pyarrow as pa

from pipeline.storage.location import join_lines

HINT = (
    "write all files with one schema, or convert them with python -m jobs.import_queries (--drop leaves a column out)"
)
DROP = "leave it out with --drop"


def replace_views(schema: pa.Schema) -> pa.Schema:
    """Replace Arrow's view types, which polars writes, by large types: pyarrow cannot filter views."""
    return pa.schema([_replace_view(field) for field in schema])


def _replace_view(field: pa.Field) -> pa.Field:
    return field.with_type(_to_large_type(field.type))


def _to_large_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_string_view(kind):
        return pa.large_string()
    if pa.types.is_binary_view(kind):
        return pa.large_binary()
    if pa.types.is_struct(kind):
        return pa.struct([_replace_view(field) for field in kind])
    if pa.types.is_map(kind):
        return pa.map_(_replace_view(kind.key_field), _replace_view(kind.item_field), kind.keys_sorted)
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_replace_view(kind.value_field), kind.list_size)
    if pa.types.is_list(kind):
        return pa.list_(_replace_view(kind.value_field))
    if pa.types.is_large_list(kind) or pa.types.is_list_view(kind):
        return pa.large_list(_replace_view(kind.value_field))
    return kind


def unify_schemas(schemas: Mapping[str, pa.Schema], hint: str = HINT) -> pa.Schema:
    """Return one schema for all files, with the columns in the order of the first.

    Null becomes any type; string, large_string and dictionaries of them become the widest; numbers and units of time
    become the wider type, which :func:`cast_table` refuses for values that it cannot hold.

    Args:
        schemas: schema of each file by its URI; not empty.
        hint: advice at the end of messages.

    Raises:
        ValueError: a column is missing in a file, or has types that cannot be unified; names the file and the column.
    """
    first_file, first = next(iter(schemas.items()))
    for file, schema in schemas.items():
        for name in {*first.names} ^ {*schema.names}:
            lacking, having = (file, first_file) if name in first.names else (first_file, file)
            raise ValueError(f"{lacking}: no column {name!r}, which {having} has; {hint}")
    return pa.schema([_unify_column(name, schemas, hint) for name in first.names])


def unify_optional_columns(schemas: Mapping[str, pa.Schema]) -> pa.Schema:
    """Return one schema for all files of an import, whose columns may be missing in some of them.

    Args:
        schemas: schema of each file, or part of a file, by its place.

    Raises:
        ValueError: a column has types that cannot be unified; names the places and the column.
    """
    names = dict.fromkeys(name for schema in schemas.values() for name in schema.names)
    return pa.schema([_unify_optional_column(name, schemas) for name in names])


def _unify_optional_column(name: str, schemas: Mapping[str, pa.Schema]) -> pa.Field:
    having = {place: schema for place, schema in schemas.items() if name in schema.names}
    return _unify_column(name, having, f"{DROP} {name}")


def _unify_column(name: str, schemas: Mapping[str, pa.Schema], hint: str) -> pa.Field:
    place, merged = "", None
    for file, schema in schemas.items():
        field = schema.field(name)
        if merged is None:
            place, merged = file, field
        elif merged != field:
            problem = f"{file}: column {name!r} is {field.type}, not {merged.type} as in {place}; {hint}"
            merged = _merge_fields(merged, field, problem)
    return merged


def _merge_fields(one: pa.Field, other: pa.Field, problem: str) -> pa.Field:
    if one.type != other.type:
        one, other = _decode_dictionary(one), _decode_dictionary(other)
    try:
        merged = pa.unify_schemas([pa.schema([one]), pa.schema([other])], promote_options="permissive").field(0)
    except pa.ArrowException:
        raise ValueError(problem) from None
    if _rounds(one.type, merged.type) or _rounds(other.type, merged.type):
        raise ValueError(problem)
    return merged


def _decode_dictionary(field: pa.Field) -> pa.Field:
    return field.with_type(field.type.value_type) if pa.types.is_dictionary(field.type) else field


def _rounds(kind: pa.DataType, merged: pa.DataType) -> bool:
    """Whether values change in the merged type without an error: decimals become floats."""
    if pa.types.is_struct(kind):
        return any(_rounds(field.type, merged.field(field.name).type) for field in kind)
    if pa.types.is_map(kind):
        return _rounds(kind.key_type, merged.key_type) or _rounds(kind.item_type, merged.item_type)
    if pa.types.is_nested(kind):
        return _rounds(kind.value_type, merged.value_type)
    return bool(pa.types.is_decimal(kind) and pa.types.is_floating(merged))


def cast_table(table: pa.Table, schema: pa.Schema, place: str, hint: str = HINT) -> pa.Table:
    """Cast the rows of a file to a unified schema.

    Args:
        table: rows with the columns of the schema, in any order.
        schema: schema to cast to.
        place: URI of the file, for messages.
        hint: advice at the end of messages.

    Raises:
        ValueError: the schema's type cannot hold a value.
    """
    return pa.table([_cast_column(table[field.name], field, place, hint) for field in schema], schema=schema)


def _cast_column(column: pa.ChunkedArray, field: pa.Field, place: str, hint: str) -> pa.ChunkedArray:
    try:
        return column.cast(field.type)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(
            f"{place}: a value of column {field.name!r} does not fit {field.type}, its type in other files "
            f"({join_lines(error)}); {hint}"
        ) from None
