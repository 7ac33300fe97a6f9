"""Hugging Face datasets, JSONL, JSON, CSV, TSV, Parquet → a query set.

``python -m jobs.import_queries --source URI --output URI [--column query=question]...``
``python -m jobs.import_queries --dataset popqa --output URI``

Rows are read one by one, spooled on this machine, checked as ``jobs.annotate`` checks them, and only then published:
an import that fails leaves what was there.
"""

import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from jobs.common import RunFile, StorageSettings, checking, start_logging, working
from pipeline.config.run import load_storage
from pipeline.config.sections import StorageConfig
from pipeline.queries.converters import (
    ColumnMapping,
    Ids,
    KnownDataset,
    Row,
    check_row,
    checked_columns,
    known_datasets,
)
from pipeline.queries.query_set import QuerySet
from pipeline.queries.sources import HUB, Source, SourceRequest, SourceRow, open_source
from pipeline.queries.writer import PlacedRow, Spool, check_free, publish_query_set, write_query_set
from pipeline.storage.lease import Lease
from pipeline.storage.location import Location, check_apart, check_bucket, locate

log = logging.getLogger(__name__)


@dataclass
class Import:
    """A source on its way to a query set.

    Attributes:
        skip_bad: leave bad rows out, and say which, instead of stopping at the first.
        limit: most rows that are taken, bad ones not counted.
        skipped: rows left out so far.
    """

    source: Source
    recipe: ColumnMapping
    output: Location
    skip_bad: bool = False
    limit: int | None = None
    skipped: int = 0
    ids: Ids = field(default_factory=Ids)

    def rows(self) -> Iterator[PlacedRow]:
        """Good rows, with their places.

        Raises:
            ValueError: a row is bad and shall not be skipped; names its place.
        """
        for row in self.source.rows:
            try:
                query = self._query(row)
            except ValueError as error:
                if not self.skip_bad:
                    columns = f" (it has {', '.join(row.values)}; --column maps them)" if row.values else ""
                    raise ValueError(
                        f"{row.place}: {error}{columns}; mend it, or leave it out with --skip-bad"
                    ) from None
                log.warning("skipped: %s: %s", row.place, error)
                self.skipped += 1
            else:
                yield row.place, query

    def _query(self, row: SourceRow) -> Row:
        if row.problem is not None:
            raise ValueError(row.problem)
        query = self.recipe.apply(row.values)
        check_row(query)
        self.ids.assign(query)
        return query

    def write(self, scratch: Path) -> QuerySet:
        """Write the set to a folder on this machine.

        Raises:
            ValueError: a row is bad, a column has nothing in it or does not fit one type, or there are no rows.
        """
        spooled, written = scratch / "spool", scratch / "set"
        for folder in (spooled, written):
            folder.mkdir()
        spool = Spool(spooled, self.source.types)
        spool.write(islice(self.rows(), self.limit))
        if not spool.schemas:
            raise ValueError(f"no rows to import ({self.skipped} bad ones)")
        for column, path in self.recipe.columns.items():
            if column not in spool.filled:
                raise ValueError(f"--column {column}={path}: no row has anything there")
        return write_query_set(spool, written, self.output)


def requested(
    dataset: str | None, source: str | None, name: str | None, split: str | None, revision: str | None
) -> tuple[SourceRequest, KnownDataset | None]:
    """What to read: as a known dataset says, except for what is given; its files may also lie elsewhere.

    Raises:
        ValueError: neither a source nor a known dataset.
    """
    if dataset is None:
        if source is None:
            raise ValueError("--source or --dataset is missing")
        return SourceRequest(source, name, split, revision), None
    if dataset not in known_datasets():
        raise ValueError(f"--dataset {dataset}: known are {', '.join(known_datasets())}; others come by --source")
    known = known_datasets()[dataset]
    if source is not None and not source.startswith(HUB):
        return SourceRequest(source, name, split, revision), known
    return SourceRequest(source or known.source, name or known.name, split or known.split, revision), known


def open_import(request: SourceRequest, output: Location, storage: StorageConfig, overwrite: bool) -> Source:
    """Check both ends before anything is read.

    Raises:
        ValueError: the source is not there, or the output is taken, inside of it, or in no bucket.
        StorageError: storage does not answer.
    """
    if not request.uri.startswith(HUB):
        check_apart(locate(request.uri, storage), output)
    check_bucket(output)
    check_free(output, overwrite)
    return open_source(request, storage)


def carry_out(job: Import, target: Location, overwrite: bool) -> QuerySet:
    """Write the set here, and put it in its place once it is whole.

    Raises:
        ValueError: a row is bad, or the output has been taken meanwhile.
        StorageError: storage does not answer.
    """
    with tempfile.TemporaryDirectory(prefix="selfrag-import-") as scratch:
        written = job.write(Path(scratch))
        with Lease(target):
            check_free(target, overwrite)  # another import may have ended only now
            publish_query_set(Path(scratch) / "set", target)
        return written


def import_queries(
    output: Annotated[str, typer.Option(help="Folder for the query set.")],
    source: Annotated[
        str | None, typer.Option(help="hf:OWNER/NAME, a folder of save_to_disk, or a file or folder, also on S3.")
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="A dataset whose columns are known, such as popqa.")] = None,
    name: Annotated[str | None, typer.Option(help="Configuration of a Hugging Face dataset.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of a Hugging Face dataset.")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a dataset on the hub.")] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=COLUMN: where a column of the query set is, such as answers=answer.aliases; repeatable."
        ),
    ] = None,
    task: Annotated[str | None, typer.Option(help="Task of every row: a task profile.")] = None,
    drop: Annotated[list[str] | None, typer.Option(help="A column to leave out; repeatable.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Take so many rows, the first good ones.")] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="List bad rows and leave them out; by default the first ends the import.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a query set that is there.")] = False,
    config: RunFile = None,
    settings: StorageSettings = None,
) -> None:
    """Make a query set of a dataset or of files.

    Exit status: 0 all rows taken, 3 some bad rows left out (--skip-bad), 1 failed, 2 bad usage or a bad row.
    """
    start_logging(progress=["pipeline.queries.writer"])
    with checking():
        storage = load_storage(config, settings or [])
        request, known = requested(dataset, source, name, split, revision)
        columns = {**(known.columns if known else {}), **checked_columns(column or [])}
        recipe = ColumnMapping(columns, task or (known.task if known else None), frozenset(drop or []))
        target = locate(output, storage)
        job = Import(open_import(request, target, storage, overwrite), recipe, target, skip_bad, limit)
    with working():
        written = carry_out(job, target, overwrite)
    skipped = f", {job.skipped} bad ones left out" if job.skipped else ""
    typer.echo(f"query set: {output}, {written.rows} rows in {written.files} files{skipped}", err=True)
    raise typer.Exit(3 if job.skipped else 0)


if __name__ == "__main__":
    typer.run(import_queries)
