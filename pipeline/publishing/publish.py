"""Publish a finished set: check the tables before a run, and register its files in them after it."""

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from pipeline.config.sections import PublishConfig, StorageConfig
from pipeline.output.folder import OutputFolder
from pipeline.publishing.delta import DeltaTable
from pipeline.publishing.iceberg import IcebergTable
from pipeline.publishing.published_set import FinishedFiles, State
from pipeline.storage.lease import Lease
from pipeline.storage.location import Location


@dataclass(frozen=True)
class Published:
    """The outcome for one table: its name, the answered rows of the set, and the state of the set in the table."""

    table: str
    rows: int
    state: State

    def describe(self) -> str:
        """Describe it in a line."""
        if self.state == State.NEW:
            return f"published: {self.rows} rows in {self.table}"
        if self.state == State.LISTED:
            return f"{self.table} has this set already"
        return (
            f"not published: {self.table} was given this run before, and lists none of these files: they are a copy, "
            "or the table was rolled back"
        )


@dataclass(frozen=True)
class Publishing:
    """The outcome for all tables of a run: what was published, or what went wrong."""

    published: Sequence[Published] = ()
    problem: str | None = None


def check_publishing(folder: Location, schema: pa.Schema, publish: PublishConfig, storage: StorageConfig) -> None:
    """Check that a set can be published, before a run begins.

    Args:
        folder: folder of the set, which need not exist.
        schema: schema of its rows.
        publish: tables.
        storage: access to object storage.

    Raises:
        ValueError: a table cannot hold the set, is elsewhere, or its package is not installed.
        StorageError: a table cannot be read.
    """
    for table in open_tables(publish, storage):
        table.check(folder, schema)


def publish_set(folder: Location, publish: PublishConfig, storage: StorageConfig) -> list[Published]:
    """Register a finished set in its tables, in each once, however often this is called.

    Raises:
        OutputInUseError: another run is using the set.
        ValueError: the set is not finished, or a table cannot hold it.
        StorageError: a table cannot be read or written.
    """
    tables = open_tables(publish, storage)
    if not tables:
        return []
    with Lease(folder):
        output = OutputFolder(folder)
        found = FinishedFiles.of(output)
        for table in tables:
            table.check(folder, found.schema)
        output.note_published(table.name for table in tables)
        return [Published(table.name, found.rows, table.publish(found)) for table in tables]


def open_tables(publish: PublishConfig, storage: StorageConfig) -> list[DeltaTable | IcebergTable]:
    """Open the tables of a configuration.

    Raises:
        ValueError: see the tables.
        StorageError: a catalog cannot be reached.
    """
    tables: list[DeltaTable | IcebergTable] = []
    if publish.delta is not None:
        tables.append(DeltaTable(publish.delta, storage))
    if publish.iceberg is not None:
        tables.append(IcebergTable(publish.iceberg))
    return tables
