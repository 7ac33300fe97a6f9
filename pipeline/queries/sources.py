"""Read the rows of Hugging Face datasets and of files.

Rows are streamed; only ``.json`` files are read into memory as a whole.
"""

import csv
import io
import json
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, starmap
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import smart_open
from pyarrow import fs

from pipeline.config.sections import StorageConfig
from pipeline.queries.schema import read_rows
from pipeline.queries.unified_schema import replace_views
from pipeline.storage.location import Location, join_lines, locate
from pipeline.storage.parquet import RowRange, is_parquet, map_in_threads, read_footer, read_range, warn_of_other_files

HUB = "hf:"
PARQUET = "parquet"
# Rows of a Hugging Face dataset that are read at a time.
BATCH_ROWS = 1024
# Cells of text files that stand for missing values, besides empty ones.
MISSING = frozenset({"", "nan", "NaN", "NaT", "None", "null", "<NA>"})
# Files that ``save_to_disk`` writes for a single dataset and for several splits.
SAVED = ("state.json", "dataset_dict.json")


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


@dataclass(frozen=True)
class Source:
    """The rows of a source, and the declared types of its columns."""

    rows: Iterator[SourceRow]
    types: Mapping[str, pa.DataType]


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


def open_source(request: SourceRequest, storage: StorageConfig) -> Source:
    """Open a source; its rows are read lazily.

    A local folder that ``save_to_disk`` has written is read as a dataset; in any other folder, every file of a known
    kind is read. ``hf:`` may also be followed by a local folder, which is then read like a repository on the hub, by
    its dataset card and its file names.

    Raises:
        ValueError: the source does not exist, or has no such configuration or split; one line.
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
    return _open_files(location)


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


def _open_dataset(request: SourceRequest, opened: Callable[[SourceRequest], Any]) -> Source:
    from datasets import ClassLabel

    with _wrapping_errors(request.uri):
        dataset = _choose_split(opened(request), request.split)
    if dataset.features is None:  # a streamed dataset without declared features
        return Source(_read_dataset(request.uri, dataset, {}), {})
    names = {column: kind.names for column, kind in dataset.features.items() if isinstance(kind, ClassLabel)}
    types = {column.name: column.type for column in dataset.features.arrow_schema}
    return Source(_read_dataset(request.uri, dataset, names), types | dict.fromkeys(names, pa.string()))


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


def _read_dataset(uri: str, dataset: Any, names: Mapping[str, list[str]]) -> Iterator[SourceRow]:
    """Yield the rows of a dataset; class labels become their names, and -1 (no class) becomes null."""
    first = 0
    with _wrapping_errors(uri):
        for table in dataset.with_format("arrow").iter(batch_size=BATCH_ROWS):
            for row in _convert_table(table, uri, first):
                labels = {column: _get_label(names[column], row.values.get(column)) for column in names}
                yield replace(row, values={**row.values, **labels})
            first += table.num_rows


def _get_label(names: list[str], number: int | None) -> str | None:
    return None if number is None or number < 0 else names[number]


@contextmanager
def _wrapping_errors(uri: str) -> Iterator[None]:
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise ValueError(f"{uri}: {join_lines(error)}") from None


def _convert_table(table: pa.Table, place: str, first: int) -> Iterator[SourceRow]:
    for row, values in enumerate(read_rows(table), first):
        if isinstance(values, UnicodeDecodeError):
            yield SourceRow(f"{place} row {row}", problem=f"not UTF-8: {values}")
        else:
            yield SourceRow(f"{place} row {row}", values)


def _open_files(location: Location) -> Source:
    files = _list_files(location)
    footers = [read_footer(file) for file, kind in files if kind == PARQUET]
    schemas = [replace_views(footer.schema.to_arrow_schema()) for footer in footers]
    try:
        schema = pa.unify_schemas(schemas, promote_options="permissive") if schemas else ()
    except pa.ArrowException as error:
        raise ValueError(f"{location.uri}: its Parquet files have incompatible schemas: {join_lines(error)}") from None
    rows = chain.from_iterable(starmap(_read_file, files))
    return Source(rows, {column.name: column.type for column in schema})


def _list_files(location: Location) -> list[tuple[Location, str]]:
    """List the files to import with their kinds: keys of ``TEXT_KINDS``, or ``PARQUET``."""
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
    return known


def _find_kind(file: Location) -> str | None:
    suffix = file.path.lower().removesuffix(".gz").rsplit(".", 1)[-1]
    if suffix in TEXT_KINDS:
        return suffix
    return PARQUET if is_parquet(file) else None


def _read_file(file: Location, kind: str) -> Iterator[SourceRow]:
    if kind == PARQUET:
        footer = read_footer(file)
        columns = footer.schema.to_arrow_schema().names
        for row, batch in read_range(RowRange(file, 0, footer.num_rows), columns):
            yield from _convert_table(pa.Table.from_batches([batch]), file.uri, row)
        return
    with _open_text(file) as stream:
        yield from TEXT_KINDS[kind](stream, file.uri)


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


def _read_json_lines(stream: IO[bytes], uri: str) -> Iterator[SourceRow]:
    for row, line in enumerate(stream):
        if line.strip():
            try:
                values = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                yield SourceRow(f"{uri} row {row}", problem=f"not JSON: {join_lines(error)}")
            else:
                yield _to_source_row(f"{uri} row {row}", values)


def _read_json(stream: IO[bytes], uri: str) -> Iterator[SourceRow]:
    """Yield the objects of a list; a file that is not JSON as a whole is read as JSON Lines."""
    content = stream.read()
    try:
        values = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        yield from _read_json_lines(io.BytesIO(content), uri)
        return
    for row, value in enumerate(values if isinstance(values, list) else [values]):
        yield _to_source_row(f"{uri} row {row}", value)


def _to_source_row(place: str, values: Any) -> SourceRow:
    if isinstance(values, dict):
        return SourceRow(place, values)
    return SourceRow(place, problem=f"expected a JSON object, found {type(values).__name__}")


def _read_csv(stream: IO[bytes], uri: str, delimiter: str = ",") -> Iterator[SourceRow]:
    """Yield the rows below the header; empty cells, and those that pandas or Python wrote for None or NaN, are null."""
    csv.field_size_limit(sys.maxsize)
    # Bytes that are not UTF-8 become surrogates, so that the error can name the row.
    text = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="")
    lines = csv.reader(text, delimiter=delimiter)
    header = next(lines, [])
    if len(set(header)) < len(header) or not _is_utf8("".join(header)):
        raise ValueError(f"{uri}: every column in the header (the first line) needs a unique name in UTF-8")
    for row, cells in enumerate(line for line in lines if line):
        place = f"{uri} row {row}"
        if len(cells) != len(header):
            yield SourceRow(place, problem=f"{len(cells)} cells, but the header has {len(header)}")
        elif not _is_utf8("".join(cells)):
            yield SourceRow(place, problem="not UTF-8")
        else:
            yield SourceRow(
                place, {name: None if cell in MISSING else cell for name, cell in zip(header, cells, strict=True)}
            )


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_tsv(stream: IO[bytes], uri: str) -> Iterator[SourceRow]:
    return _read_csv(stream, uri, "\t")


TEXT_KINDS: Mapping[str, Callable[[IO[bytes], str], Iterator[SourceRow]]] = {
    "jsonl": _read_json_lines,
    "ndjson": _read_json_lines,
    "json": _read_json,
    "csv": _read_csv,
    "tsv": _read_tsv,
}
