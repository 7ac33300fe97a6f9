"""Read the rows of Hugging Face datasets and of files, in batches."""

import csv
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import smart_open
from pyarrow import fs

from pipeline.config.sections import StorageConfig
from pipeline.queries.converters import ColumnMapping
from pipeline.queries.partitions import (
    Partition,
    add_partition_values,
    append_fields,
    append_partition,
    find_partition,
    infer_types,
    parse_partition,
    warn_of_columns_above,
)
from pipeline.queries.schema import check_readable
from pipeline.queries.source_rows import ArrowBatch, PythonBatch, SourceBatch, SourceRow
from pipeline.queries.text_files import TEXT_KINDS
from pipeline.queries.unified_schema import replace_views, unify_optional_columns
from pipeline.storage.location import Location, join_lines, locate
from pipeline.storage.parquet import (
    BATCH_ROWS,
    RowRange,
    is_parquet,
    map_in_threads,
    read_footer,
    read_range,
    warn_of_other_files,
)

HUB = "hf:"
PARQUET = "parquet"
# Files that ``save_to_disk`` writes for a single dataset and for several splits.
SAVED = ("state.json", "dataset_dict.json")


@dataclass(frozen=True)
class SourceRequest:
    """A source to read.

    Attributes:
        uri: ``hf:`` and the name of a dataset on the Hugging Face hub, or the URI of a file or folder.
        name: configuration of a Hugging Face dataset; None for files.
        split: split of a Hugging Face dataset; None for files.
        revision: revision of a dataset on the Hugging Face hub; None for files.
    """

    uri: str
    name: str | None = None
    split: str | None = None
    revision: str | None = None


def open_source(request: SourceRequest, storage: StorageConfig, mapping: ColumnMapping) -> Iterator[SourceBatch]:
    """Open a source; its rows are read lazily.

    A local folder that ``save_to_disk`` has written is read as a dataset; in any other folder, every file of a known
    kind is read. ``hf:`` may also be followed by a local folder, which is then read like a repository on the hub, by
    its dataset card and its file names.

    Args:
        request: source to read.
        storage: access to object storage.
        mapping: columns to read; others that do not pass either are not read at all.

    Raises:
        ValueError: the source does not exist, has no such configuration or split, or columns of its Parquet files have
            types that cannot be unified; one line.
        StorageError: the storage cannot be read.
    """
    if request.uri.startswith(HUB):
        return _open_dataset(request, _load_hub_dataset)
    location = locate(request.uri, storage)
    if location.local and any((location / name).exists() for name in SAVED):
        return _open_dataset(replace(request, uri=location.path), _load_saved_dataset)
    for option in ("name", "split", "revision"):
        if getattr(request, option) is not None:
            raise ValueError(f"--{option} is for Hugging Face datasets (hf:…, or saved by save_to_disk)")
    return _open_files(location, mapping)


def _load_hub_dataset(request: SourceRequest) -> Any:
    # https://huggingface.co/docs/datasets/stream
    from datasets import load_dataset

    return load_dataset(request.uri.removeprefix(HUB), request.name, revision=request.revision, streaming=True)


def _load_saved_dataset(request: SourceRequest) -> Any:
    # https://huggingface.co/docs/datasets/process#save
    from datasets import load_from_disk

    if request.name or request.revision:
        raise ValueError("a dataset saved by save_to_disk has neither --name nor --revision")
    return load_from_disk(request.uri)


def _open_dataset(request: SourceRequest, opened: Callable[[SourceRequest], Any]) -> Iterator[SourceBatch]:
    from datasets import ClassLabel

    with _wrapping_errors(request.uri):
        dataset = _choose_split(opened(request), request.split)
    features = dataset.features or {}  # a streamed dataset may have none declared
    names = {column: kind.names for column, kind in features.items() if isinstance(kind, ClassLabel)}
    return _read_dataset(request.uri, dataset, names)


def _choose_split(found: Any, wanted: str | None) -> Any:
    if not isinstance(found, dict):
        if wanted not in (None, str(found.split)):
            raise ValueError(f"no split {wanted!r}; the dataset has no splits")
        return found
    if wanted is None and len(found) == 1:
        return next(iter(found.values()))
    if wanted not in found:
        missing = "several splits" if wanted is None else f"no split {wanted!r}"
        raise ValueError(f"{missing}; choose one with --split: {', '.join(found)}")
    return found[wanted]


def _read_dataset(uri: str, dataset: Any, names: Mapping[str, list[str]]) -> Iterator[SourceBatch]:
    """Yield the rows of a dataset; class labels become their names, and -1 (no class) becomes null."""
    first = 0
    with _wrapping_errors(uri):
        for table in dataset.with_format("arrow").iter(batch_size=BATCH_ROWS):
            rows = table.cast(replace_views(table.schema))
            for column, labels in names.items():
                rows = rows.set_column(rows.schema.get_field_index(column), column, _name_labels(rows[column], labels))
            yield ArrowBatch(uri, first, rows)
            first += table.num_rows


def _name_labels(numbers: pa.ChunkedArray, names: list[str]) -> pa.ChunkedArray:
    known = pc.if_else(pc.greater_equal(numbers, 0), numbers, None)
    return pc.take(pa.array(names, pa.string()), known)


@contextmanager
def _wrapping_errors(uri: str) -> Iterator[None]:
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise ValueError(f"{uri}: {join_lines(error)}") from None


@dataclass(frozen=True)
class SourceFile:
    """A file to import.

    Attributes:
        file: the file.
        kind: key of ``TEXT_KINDS``, or ``PARQUET``.
        partition: partition columns that its path names, as texts.
    """

    file: Location
    kind: str
    partition: Partition


def _open_files(location: Location, mapping: ColumnMapping) -> Iterator[SourceBatch]:
    files = _list_files(location)
    warn_of_columns_above(location, [name for file in files for name in file.partition])
    read = [name for file in files for name in file.partition if mapping.reads(name)]
    own = _unify_passed_columns([file.file for file in files if file.kind == PARQUET], mapping)
    types = infer_types((file.partition for file in files), read, {field.name: field.type for field in own})
    return chain.from_iterable(_read_file(file, types, mapping) for file in files)


def _unify_passed_columns(files: list[Location], mapping: ColumnMapping) -> pa.Schema:
    """Unify the columns that pass, which would otherwise fail after the last file is read.

    Raises:
        ValueError: they cannot be unified, one occurs twice in a file, or pyarrow cannot read it.
    """
    footers = map_in_threads(read_footer, files)
    schemas = {}
    for file, footer in zip(files, footers, strict=True):
        if footer.num_rows:  # pandas writes an empty table without the types of its columns
            schema = _select_used_columns(footer.schema.to_arrow_schema(), mapping)
            check_readable(schema, file.uri)
            schemas[file.uri] = pa.schema([field for field in replace_views(schema) if mapping.passes(field.name)])
    return unify_optional_columns(schemas)


def _select_used_columns(schema: pa.Schema, mapping: ColumnMapping) -> pa.Schema:
    return pa.schema([field for field in schema if mapping.reads(field.name) or mapping.passes(field.name)])


def _list_files(location: Location) -> list[SourceFile]:
    found = location.get_type()
    if found == fs.FileType.NotFound:
        raise ValueError(f"{location.uri}: not found (a dataset on the Hugging Face hub is written hf:OWNER/NAME)")
    files = [location] if found == fs.FileType.File else location.list_files()
    kinds = map_in_threads(_find_kind, files)
    known = [(file, kind) for file, kind in zip(files, kinds, strict=True) if kind]
    if not known:
        texts = ", ".join(f".{kind}" for kind in TEXT_KINDS)
        raise ValueError(f"{location.uri}: no files to import; supported are Parquet, {texts}, text also with .gz")
    warn_of_other_files(location, files, [file for file, _ in known])
    return [SourceFile(file, kind, parse_partition(find_partition(file, location))) for file, kind in known]


def _find_kind(file: Location) -> str | None:
    suffix = file.path.lower().removesuffix(".gz").rsplit(".", 1)[-1]
    if suffix in TEXT_KINDS:
        return suffix
    return PARQUET if is_parquet(file) else None


def _read_file(source: SourceFile, types: Mapping[str, pa.DataType], mapping: ColumnMapping) -> Iterator[SourceBatch]:
    if source.kind == PARQUET:
        yield from _read_parquet(source, types, mapping)
        return
    with _open_text(source.file) as stream:
        rows = TEXT_KINDS[source.kind](stream, source.file.uri)
        while batch := list(islice(rows, BATCH_ROWS)):
            yield PythonBatch([_add_partition(row, source.partition, types) for row in batch])


def _read_parquet(
    source: SourceFile, types: Mapping[str, pa.DataType], mapping: ColumnMapping
) -> Iterator[SourceBatch]:
    footer = read_footer(source.file)
    schema = replace_views(_select_used_columns(footer.schema.to_arrow_schema(), mapping))
    whole = append_fields(schema, source.partition, types)
    for row, batch in read_range(RowRange(source.file, 0, footer.num_rows), schema.names):
        table = append_partition(pa.Table.from_batches([batch]).cast(schema), source.partition, source.file.uri)
        yield ArrowBatch(source.file.uri, row, table.select(whole.names).cast(whole))


def _add_partition(row: SourceRow, partition: Partition, types: Mapping[str, pa.DataType]) -> SourceRow:
    if row.problem is not None:
        return row
    try:
        return replace(row, values=add_partition_values(row.values, partition, types))
    except ValueError as error:
        return SourceRow(row.place, problem=str(error))


@contextmanager
def _open_text(file: Location) -> Iterator[IO[bytes]]:
    """Open a text file, decompressed; a remote one is downloaded first, so that transient errors can be retried."""
    with tempfile.TemporaryDirectory(prefix="selfrag-import-") as folder:
        path = Path(file.path)
        if not file.local:
            path = Path(folder) / path.name
            file.fetch(path)
        try:
            with smart_open.open(str(path), "rb") as stream:
                yield stream
        except (EOFError, OSError, csv.Error, zlib.error) as error:
            raise ValueError(f"{file.uri}: cannot be read: {join_lines(error)}") from None
