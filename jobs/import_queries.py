"""Import a query set from a Hugging Face dataset or from JSONL, JSON, CSV, TSV or Parquet files.

``python -m jobs.import_queries --source URI --output URI [--column query=question]...``
``python -m jobs.import_queries --dataset popqa --output URI``

Rows are read in batches, spooled to the local disk, checked as ``jobs.annotate`` checks them, and only then published:
an import that fails earlier leaves an existing query set unchanged.
"""

import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from jobs.common import RunFile, StorageSettings, checking, parse_columns, start_logging, working
from jobs.shell import run
from pipeline.config.run import load_storage
from pipeline.config.sections import StorageConfig
from pipeline.queries.converters import (
    ColumnMapping,
    Ids,
    KnownDataset,
    Row,
    check_row,
    load_known_datasets,
)
from pipeline.queries.query_set import QuerySet
from pipeline.queries.source_rows import SourceBatch, SourceRow
from pipeline.queries.sources import HUB, SourceRequest, open_source
from pipeline.queries.writer import Spool, check_free, publish_query_set, write_query_set
from pipeline.storage.lease import Lease
from pipeline.storage.location import Location, check_apart, check_writable, locate

log = logging.getLogger(__name__)


@dataclass
class Import:
    """An import from a source into a query set.

    Attributes:
        skip_bad: whether bad rows are logged and left out; otherwise the first one ends the import.
        limit: maximum rows to import; bad rows do not count.
        skipped: number of rows left out so far.
    """

    source: Iterator[SourceBatch]
    mapping: ColumnMapping
    output: Location
    skip_bad: bool = False
    limit: int | None = None
    skipped: int = 0
    ids: Ids = field(default_factory=Ids)

    def _convert_batch(self, batch: SourceBatch, limit: int | None) -> dict[int, Row]:
        """Convert the good rows of a batch, at most ``limit``, by their numbers in the batch.

        Raises:
            ValueError: a row is bad and ``skip_bad`` is not set; the message names its place.
        """
        good: dict[int, Row] = {}
        for number, row in enumerate(batch.read_rows(self.mapping)):
            if len(good) == limit:
                break
            try:
                good[number] = self._convert_row(row)
            except ValueError as error:
                if not self.skip_bad:
                    columns = "" if row.problem else f" ({self._describe_columns(batch)}; map them with --column)"
                    raise ValueError(
                        f"{row.place}: {error}{columns}; fix the row, or skip it with --skip-bad"
                    ) from None
                log.warning("skipped: %s: %s", row.place, error)
                self.skipped += 1
        return good

    def _describe_columns(self, batch: SourceBatch) -> str:
        names = batch.list_columns()
        missing = [
            path for path in self.mapping.columns.values() if path not in names and path.split(".")[0] not in names
        ]
        absent = f"no column {missing[0]!r}; " if missing else ""
        return f"{absent}columns: {', '.join(names)}"

    def _convert_row(self, row: SourceRow) -> Row:
        if row.problem is not None:
            raise ValueError(row.problem)
        query = self.mapping.apply(row.values)
        check_row(query)
        self.ids.assign(query)
        return query

    def write(self, scratch: Path) -> QuerySet:
        """Write the query set to a local folder.

        Raises:
            ValueError: a row is bad, a mapped column is empty, a column has values of several types, or there are no
                rows.
        """
        spooled, written = scratch / "spool", scratch / "set"
        for folder in (spooled, written):
            folder.mkdir()
        spool = Spool(spooled)
        for batch in self.source:
            if spool.rows == self.limit:
                break
            good = self._convert_batch(batch, self.limit and self.limit - spool.rows)
            if good:
                spool.write(batch.place, list(good.values()), batch.pass_columns(self.mapping, list(good)))
        if not spool.rows:
            raise ValueError(f"no rows to import ({self.skipped} bad rows skipped)")
        for column, path in self.mapping.columns.items():
            if column not in spool.filled:
                raise ValueError(f"--column {column}={path}: empty in every row")
        return write_query_set(spool, written, self.output)


def build_request(
    dataset: str | None, source: str | None, name: str | None, split: str | None, revision: str | None
) -> tuple[SourceRequest, KnownDataset | None]:
    """Build the request for a source, and look up the known dataset that ``dataset`` names.

    The known dataset supplies the source, name and split that are not given. A source that is not on the hub holds
    the dataset's files elsewhere: it is read as given, and its columns are mapped as the known dataset's.

    Raises:
        ValueError: neither a source nor a known dataset is given.
    """
    if dataset is None:
        if source is None:
            raise ValueError("--source or --dataset is required")
        return SourceRequest(source, name, split, revision), None
    if dataset not in load_known_datasets():
        raise ValueError(
            f"--dataset {dataset}: expected one of {', '.join(load_known_datasets())}; import others with --source"
        )
    known = load_known_datasets()[dataset]
    if source is not None and not source.startswith(HUB):
        return SourceRequest(source, name, split, revision), known
    return SourceRequest(source or known.source, name or known.name, split or known.split, revision), known


def open_import(
    request: SourceRequest, mapping: ColumnMapping, output: Location, storage: StorageConfig, overwrite: bool
) -> Iterator[SourceBatch]:
    """Check source and output before any row is read, and open the source.

    Raises:
        ValueError: the source does not exist; the output is not free; one contains the other; or the output's bucket
            does not exist.
        StorageError: the storage does not answer.
    """
    if not request.uri.startswith(HUB):
        check_apart(locate(request.uri, storage), output)
    check_writable(output)
    check_free(output, overwrite)
    return open_source(request, storage, mapping)


def run_import(job: Import, target: Location, overwrite: bool) -> QuerySet:
    """Write the query set to a temporary folder, and publish it once it is complete.

    Raises:
        ValueError: a row is bad, or the output is no longer free.
        StorageError: the storage does not answer.
    """
    with tempfile.TemporaryDirectory(prefix="selfrag-import-") as scratch:
        written = job.write(Path(scratch))
        with Lease(target):
            check_free(target, overwrite)  # another import may have finished in the meantime
            publish_query_set(Path(scratch) / "set", target)
        return written


def import_queries(
    output: Annotated[str, typer.Option(help="Folder for the query set.")],
    source: Annotated[
        str | None,
        typer.Option(help="hf:OWNER/NAME, a folder written by save_to_disk, or a file or folder, also on S3."),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="A dataset with a built-in column mapping, such as popqa.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Configuration of a Hugging Face dataset.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of a Hugging Face dataset.")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a dataset on the hub.")] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=COLUMN: source of a column of the query set, such as answers=answer.aliases; repeatable."
        ),
    ] = None,
    task: Annotated[str | None, typer.Option(help="Task of all rows: the name of a task profile.")] = None,
    drop: Annotated[list[str] | None, typer.Option(help="A column to leave out; repeatable.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Import at most this many rows; bad rows do not count.")
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Log and skip bad rows; by default the first one ends the import.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing query set.")] = False,
    config: RunFile = None,
    settings: StorageSettings = None,
) -> None:
    """Import a query set from a dataset or from files.

    Exit status: 0 all rows imported, 3 bad rows skipped (--skip-bad), 1 failed, 2 bad usage or a bad row.
    """
    start_logging(progress=["pipeline.queries.writer"])
    with checking():
        storage = load_storage(config, settings or [])
        request, known = build_request(dataset, source, name, split, revision)
        columns = {**(known.columns if known else {}), **parse_columns(column or [], "query=question")}
        mapping = ColumnMapping(columns, task or (known.task if known else None), frozenset(drop or []))
        target = locate(output, storage)
        found = open_import(request, mapping, target, storage, overwrite)
        job = Import(found, mapping, target, skip_bad, limit)
    with working():
        written = run_import(job, target, overwrite)
    skipped = f", {job.skipped} bad rows skipped" if job.skipped else ""
    typer.echo(f"query set: {output}, {written.rows} rows in {written.files} files{skipped}", err=True)
    raise typer.Exit(3 if job.skipped else 0)


if __name__ == "__main__":
    run(import_queries)
