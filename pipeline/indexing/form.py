"""The form of passages in their files: which columns are read, of which types, and how they become strings."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.indexing.embeddings import check_embeddings
from pipeline.retrieval.passage_columns import (
    PASSAGE_SCHEMA,
    MetadataType,
    convert_metadata,
    extend_schema,
    find_metadata_type,
)
from pipeline.storage.location import Location

NAMES = tuple(PASSAGE_SCHEMA.names)


def _is_text(kind: pa.DataType) -> bool:
    values = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(values) or pa.types.is_large_string(values) or pa.types.is_string_view(values))


def _is_text_or_integer(kind: pa.DataType) -> bool:
    return _is_text(kind) or bool(pa.types.is_integer(kind))


def _is_text_or_null(kind: pa.DataType) -> bool:
    return _is_text(kind) or bool(pa.types.is_null(kind))


# A title may be missing in every row, and pyserini and wiki_dpr number their passages.
TYPES: Mapping[str, Callable[[pa.DataType], bool]] = {
    "id": _is_text_or_integer,
    "title": _is_text_or_null,
    "text": _is_text,
}


@dataclass(frozen=True)
class PassageForm:
    """The form in which passages are read.

    Attributes:
        columns: maps id, title and text to columns of the files; one that is not mapped is read under its own name,
            unless another one is read from that column.
        embeddings: column of the passages' vectors; None computes them with the encoder.
        max_words: number of words that a part has at most; longer passages are split. None keeps all whole.
        metadata: further columns that are kept.

    Raises:
        ValueError: a mapped column is not one of passages, ``max_words`` is set beside ``embeddings``, or a further
            column has the name of another one.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    embeddings: str | None = None
    max_words: int | None = None
    metadata: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in self.columns:
            if name not in NAMES:
                raise ValueError(f"--column {name}=…: passages have the columns {', '.join(NAMES)}")
        if self.embeddings and self.max_words:
            raise ValueError(
                f"--max-words {self.max_words}: the vectors of --embeddings {self.embeddings} are those of whole "
                "passages; leave out one of the two options"
            )
        taken = list(NAMES)
        for name in self.metadata:
            if name.lower() in taken:
                raise ValueError(f"--metadata {name}: the index has a column of this name; rename it in the files")
            taken.append(name.lower())

    @cached_property
    def sources(self) -> Mapping[str, str]:
        """The files' column of each of id, title and text that is read."""
        taken = self.columns.values()
        return {name: self.columns.get(name, name) for name in NAMES if name in self.columns or name not in taken}

    def list_columns(self) -> list[str]:
        """Return the columns of the files that are read, without vectors, each once."""
        return list(dict.fromkeys([*self.sources.values(), *self.metadata]))

    def check_schema(self, file: Location, schema: pa.Schema) -> None:
        """Check the columns of a file; the title may be missing.

        Raises:
            ValueError: a column is missing, of another type, or there twice; names file and column.
        """
        if missing := [name for name in ("id", "text") if self.sources.get(name) not in schema.names]:
            columns = " or ".join(self.columns.get(name, name) for name in missing)
            options = " ".join(f"--column {name}=COLUMN" for name in missing)
            found = ", ".join(schema.names)
            raise ValueError(f"{file.uri}: no column {columns}, found {found}; name another with {options}")
        for name, column in self.sources.items():
            if schema.names.count(column) > 1:
                raise ValueError(f"{file.uri}: several columns are named {column}; rename all but one")
            if column in schema.names and not TYPES[name](kind := schema.field(column).type):
                raise ValueError(f"{file.uri}: column {column} is {kind}; convert it to string")
        self.find_metadata_types(file, schema)
        if self.embeddings:
            check_embeddings(file, schema, self.embeddings)

    def find_metadata_types(self, file: Location, schema: pa.Schema) -> dict[str, MetadataType]:
        """Return the types in which the further columns of a file are kept.

        Raises:
            ValueError: a column is missing, of a type that is not kept, or there twice; names file and column.
        """
        found = {}
        for name in self.metadata:
            if schema.names.count(name) != 1:
                problem = "several columns" if name in schema.names else "no column"
                raise ValueError(f"{file.uri}: {problem} {name} (--metadata), found {', '.join(schema.names)}")
            kind = find_metadata_type(schema.field(name).type)
            if kind is None:
                raise ValueError(
                    f"{file.uri}: column {name} is {schema.field(name).type}; --metadata keeps strings, integers, "
                    "numbers, bools, dates and lists of strings"
                )
            found[name] = kind
        return found

    def has_title(self, schema: pa.Schema) -> bool:
        """Whether a file has the column of titles."""
        return self.sources.get("title") in schema.names

    def convert(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Convert rows of a file to passages: integers become text; missing and null titles are empty."""
        kinds = {name: find_metadata_type(batch.schema.field(name).type) or "string" for name in self.metadata}
        further = [convert_metadata(batch[name], kind) for name, kind in kinds.items()]
        columns = [self._convert_column(batch, name) for name in NAMES]
        return pa.record_batch([*columns, *further], schema=extend_schema(kinds))

    def _convert_column(self, batch: pa.RecordBatch, name: str) -> pa.Array:
        column = self.sources.get(name)
        if column not in batch.schema.names:
            return pa.repeat("", batch.num_rows)
        strings = batch[column].cast(pa.string())
        return pc.fill_null(strings, "") if name == "title" else strings
