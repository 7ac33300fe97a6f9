"""Read the rows of JSONL, JSON, CSV and TSV files; ``.json`` files are read into memory as a whole."""

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

from pipeline.queries.source_rows import SourceRow
from pipeline.storage.location import join_lines

# Cells of text files that stand for missing values, besides empty ones.
MISSING = frozenset({"", "nan", "NaN", "NaT", "None", "null", "<NA>"})


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
