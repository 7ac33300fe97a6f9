"""Convert a source's rows to rows of a query set. The columns of known datasets are in ``converters.yaml``."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import pyarrow as pa
import yaml
from pydantic import Field

from pipeline.config.loading import Frozen
from pipeline.config.sections import Columns
from pipeline.queries.schema import QUERY_FIELDS, to_query
from pipeline.queries.values import hash_values, is_labeled, to_choices, to_passages, to_text, to_text_sets, to_texts

BUILT_IN = Path(__file__).with_suffix(".yaml")

Row = dict[str, Any]


class KnownDataset(Frozen):
    """A dataset whose columns are known; attributes as in ``converters.yaml``."""

    source: str
    name: str | None = None
    split: str
    task: str
    columns: dict[str, str] = Field(default_factory=dict)


@cache
def load_known_datasets() -> dict[str, KnownDataset]:
    """Return the datasets that come with the project, by name."""
    return {name: KnownDataset.model_validate(d) for name, d in yaml.safe_load(BUILT_IN.read_text("utf-8")).items()}


@dataclass(frozen=True)
class ColumnMapping:
    """The mapping from a source's columns to those of a query set.

    Attributes:
        columns: maps columns of the query set to columns of the source, or to dotted paths into nested ones; columns
            that are not mapped are read under their own names.
        task: task of every row; by default the source's column ``task``.
        drop: columns of the source that are left out of the result; ``columns`` may still read them.

    Raises:
        ValueError: ``columns`` maps a column that query sets do not have.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    task: str | None = None
    drop: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for column in self.columns:
            if column not in CONVERTERS:
                raise ValueError(f"--column {column}=…: a query set has the columns {', '.join(CONVERTERS)}")

    def reads(self, column: str) -> bool:
        """Whether a column of the source is read."""
        return any(column in (path, path.split(".")[0]) for path in self._paths.values())

    def select_fields(self, field: pa.Field) -> pa.Field:
        """Return a column of the source with only those of its inner fields that are read."""
        paths = [path.split(".") for path in self._paths.values()]
        if any(path == field.name for path in self._paths.values()):
            return field
        return field.with_type(_select_fields(field.type, [path[1:] for path in paths if path[0] == field.name]))

    def passes(self, column: str) -> bool:
        """Whether a column of the source passes through unchanged."""
        return column not in self._taken

    def apply(self, values: Mapping[str, Any]) -> Row:
        """Convert the values of a row to the query set's columns; null if the source has no value.

        Raises:
            ValueError: a value cannot be converted to its column's type; names the column.
        """
        row: Row = dict.fromkeys(CONVERTERS)
        for column, path in self._paths.items():
            if (value := find_value(values, path)) is not None:
                row[column] = self._convert(column, path, value)
        row["task"] = self.task or row["task"]
        return replace_labels(row)

    def _convert(self, column: str, path: str, value: Any) -> Any:
        try:
            return CONVERTERS[column](value)
        except ValueError as error:
            source = f" (from {path})" if path != column else ""
            raise ValueError(f"column {column!r}{source}: {error}") from None

    @cached_property
    def _paths(self) -> dict[str, str]:
        """The source's path of each column; a column that is mapped or dropped is not also read under its own name."""
        taken = {*self.columns.values(), *self.drop}
        unmapped = {column: column for column in CONVERTERS if column not in taken}
        return {**unmapped, **self.columns}

    @cached_property
    def _taken(self) -> frozenset[str]:
        """The columns of the source that do not pass through."""
        return frozenset([*self.columns.values(), *self.drop, *CONVERTERS])


def _select_fields(kind: pa.DataType, paths: Sequence[Sequence[str]]) -> pa.DataType:
    """Leave out the inner fields of a type that none of the paths leads to."""
    if not all(paths):  # one of them reads all
        return kind
    if pa.types.is_struct(kind):
        inner = {field.name: [path[1:] for path in paths if path[0] == field.name] for field in kind}
        return pa.struct([f.with_type(_select_fields(f.type, inner[f.name])) for f in kind if inner[f.name]])
    if pa.types.is_list(kind):
        return pa.list_(_select_fields(kind.value_type, paths))
    if pa.types.is_large_list(kind):
        return pa.large_list(_select_fields(kind.value_type, paths))
    return kind


def find_value(values: Mapping[str, Any], path: str) -> Any:
    """Return the value at a dotted path, or None; a list on the path yields the list of its items' values."""
    if path in values:
        return values[path]
    found: Any = values
    for name in path.split("."):
        found = _get_member(found, name)
    return found


def _get_member(value: Any, name: str) -> Any:
    if isinstance(value, list):
        return [_get_member(item, name) for item in value]
    return value.get(name) if isinstance(value, dict) else None


def replace_labels(row: Row) -> Row:
    """Replace labeled choices, as in ARC, by the letters A, B, …, and append their texts to the query.

    Labels in the answers are replaced too; in ARC they are A to E or 1 to 4. The released script
    (github.com/AkariAsai/self-rag, ``run_short_form.py``) prompts in this form, and the profile ``arc_challenge``
    expects it. Rows without labeled choices are returned unchanged.

    Raises:
        ValueError: a choice has no label, two have the same, or there are more than 26 choices.
    """
    choices = row["choices"] or []
    if not row["query"] or not any(map(is_labeled, choices)):
        return row
    if not all(map(is_labeled, choices)) or len(choices) > len(ascii_uppercase):
        raise ValueError("column 'choices': every choice needs a label and a text, and at most 26 are supported")
    letters = {to_text(choice["label"]): letter for choice, letter in zip(choices, ascii_uppercase, strict=False)}
    if len(letters) < len(choices):
        raise ValueError("column 'choices': two choices have the same label")
    lines = [f"{letters[to_text(choice['label'])]}: {to_text(choice['text']) or ''}" for choice in choices]
    answers = row["answers"] and [letters.get(answer, answer) for answer in row["answers"]]
    query = "\n".join([row["query"], *lines])
    return {**row, "query": query, "choices": list(letters.values()), "answers": answers}


CONVERTERS: Mapping[str, Callable[[Any], Any]] = {
    "id": to_text,
    "query": to_text,
    "input": to_text,
    "task": to_text,
    "choices": to_choices,
    "filter": to_text,
    "answers": to_texts,
    "short_answers": to_text_sets,
    "gold_passage_id": to_text,
    "passages": to_passages,
}
assert list(CONVERTERS) == QUERY_FIELDS.names


@dataclass
class Ids:
    """Assigns a unique id to every row. The first row decides whether the source has ids.

    If it has none, the id is a digest of query, input, choices and given passages. Unlike a row number or a digest of
    the whole row, it stays the same if rows are added, removed or sorted, or gold answers are corrected. Rows with
    equal digests are numbered: from the second on, the id ends in -2, -3, …

    Memory: all ids.

    Attributes:
        seen: number of rows so far with each id, before numbering.
        made: whether ids are generated; None before the first row.
    """

    seen: Counter[str] = field(default_factory=Counter)
    made: bool | None = None

    def assign(self, row: Row) -> None:
        """Set the row's id.

        Raises:
            ValueError: this row has an id and the first has none, or the reverse, or an earlier row has the same id.
        """
        if self.made is None:
            self.made = row["id"] is None
        if self.made and row["id"] is not None:
            raise ValueError(f"has an id ({row['id']!r}), but the first row has none; --drop id generates all ids")
        if self.made:
            row["id"] = hash_content(row)
        elif row["id"] is None:
            raise ValueError("has no id, but the first row has one; --drop id generates all ids")
        self.seen[row["id"]] += 1
        times = self.seen[row["id"]]
        if times > 1 and not self.made:
            raise ValueError(f"id {row['id']!r} is not unique: an earlier row has the same id")
        if times > 1:
            row["id"] = f"{row['id']}-{times}"


def hash_content(row: Mapping[str, Any]) -> str:
    """Return a digest of query, input, choices and given passages: 20 hexadecimal digits."""
    return hash_values([row[name] for name in ("query", "input", "choices", "passages")])


def check_row(row: Mapping[str, Any]) -> None:
    """Reject a row that ``jobs.annotate`` would write to ``errors/`` with any model.

    Raises:
        ValueError: the query is empty, a choice is null, a given passage has no id, or two have the same.
    """
    to_query(row, Columns()).check()
