"""The form of passages in their files: which columns are read, of which types, and how they become strings."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.indexing.embeddings import check_embeddings
from pipeline.retrieval.shard_files import PASSAGE_SCHEMA
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

    Raises:
        ValueError: a mapped column is not one of passages, or ``max_words`` is set beside ``embeddings``.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    embeddings: str | None = None
    max_words: int | None = None

    def __post_init__(self) -> None:
        for name in self.columns:
            if name not in NAMES:
                raise ValueError(f"--column {name}=…: passages have the columns {', '.join(NAMES)}")
        if self.embeddings and self.max_words:
            raise ValueError(
                f"--max-words {self.max_words}: the vectors of --embeddings {self.embeddings} are those of whole "
                "passages; leave out one of the two options"
            )

    @cached_property
    def sources(self) -> Mapping[str, str]:
        """The files' column of each of id, title and text that is read."""
        taken = self.columns.values()
        return {name: self.columns.get(name, name) for name in NAMES if name in self.columns or name not in taken}

    def list_columns(self) -> list[str]:
        """Return the columns of the files that id, title and text are read from, each once."""
        return list(dict.fromkeys(self.sources.values()))

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
        if self.embeddings:
            check_embeddings(file, schema, self.embeddings)

    def has_title(self, schema: pa.Schema) -> bool:
        """Whether a file has the column of titles."""
        return self.sources.get("title") in schema.names

    def convert(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Convert rows of a file to ``PASSAGE_SCHEMA``: integers become text; missing and null titles are empty."""
        return pa.record_batch([self._convert_column(batch, name) for name in NAMES], schema=PASSAGE_SCHEMA)

    def _convert_column(self, batch: pa.RecordBatch, name: str) -> pa.Array:
        column = self.sources.get(name)
        if column not in batch.schema.names:
            return pa.repeat("", batch.num_rows)
        strings = batch[column].cast(pa.string())
        return pc.fill_null(strings, "") if name == "title" else strings
