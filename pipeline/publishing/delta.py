"""Register the files of a set in a Delta table: https://github.com/delta-io/delta/blob/master/PROTOCOL.md.

The table's folder must be above the sets: readers such as Polars and pyarrow do not follow absolute paths. Each run is
a transaction of an application of its own (``txn`` in the protocol), so that it is committed once, whoever repeats it.
Folders between the table and the set that name a partition, such as ``date=2026-11-29``, are partition columns.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote

import pyarrow as pa

from pipeline.config.sections import StorageConfig
from pipeline.publishing.published_set import (
    FinishedFiles,
    State,
    check_table_columns,
    describe_error,
    find_difference,
)
from pipeline.queries.partitions import find_partition, parse_partition
from pipeline.storage.location import Location, StorageError, locate
from pipeline.storage.s3 import resolve_storage

APPLICATION = "selfrag-batch"
# A commit that meets another one is repeated, after a look whether that was this set's.
ATTEMPTS = 5


class DeltaTable:
    """A Delta table that may not exist yet.

    Raises:
        ValueError: the package deltalake is missing, or there is no file system for the URI.
    """

    def __init__(self, uri: str, storage: StorageConfig) -> None:
        try:
            import deltalake
        except ImportError:
            raise ValueError("publish.delta needs the package deltalake: pip install 'selfrag-batch[delta]'") from None
        self._api: Any = deltalake
        self._place = locate(uri, storage)
        self._uri = self._place.path if self._place.local else uri
        self._options = _build_options(storage) if uri.startswith("s3://") else None

    @property
    def name(self) -> str:
        """The table, for messages."""
        return f"delta {self._place.uri}"

    def check(self, folder: Location, schema: pa.Schema) -> None:
        """Check that a set can be registered: its folder, its columns, and those of the table, if there is one.

        Args:
            folder: folder of the set, which need not exist.
            schema: schema of its rows.

        Raises:
            ValueError: the folder is not below the table's, or the columns differ; names the column.
            StorageError: the table cannot be read.
        """
        partitions = self._find_partitions(folder)
        if double := sorted(partitions.keys() & set(schema.names)):
            raise ValueError(f"publish.delta: the column {double[0]!r} is in the rows and in the path of {folder.uri}")
        columns = _add_partitions(schema, partitions)
        check_table_columns(columns)
        if (table := self._open()) is None:
            return
        if (known := table.metadata().partition_columns) != list(partitions):
            by = ", ".join(known) or "nothing"
            raise ValueError(f"publish.delta {self._place.uri}: is partitioned by {by}, unlike {folder.uri}")
        if difference := find_difference(columns, pa.schema(table.schema().to_arrow())):
            raise ValueError(f"publish.delta {self._place.uri}: {difference}; use another table")
        constrained = [key for key in table.metadata().configuration if key.startswith("delta.constraints.")]
        constrained += [field.name for field in table.schema().fields if not field.nullable]
        if constrained:
            raise ValueError(f"publish.delta {self._place.uri}: has constraints ({constrained[0]}); use another table")

    def publish(self, found: FinishedFiles) -> State:
        """Register a set in one commit, if the table does not have it.

        Raises:
            ValueError: see :meth:`check`.
            StorageError: the table cannot be read or written, or lists other versions of the set's files.
        """
        for attempt in range(1, ATTEMPTS + 1):
            self.check(found.folder, found.schema)
            table = self._open()
            if table is not None and table.transaction_version(_name_application(found)) is not None:
                return self._compare(table, found)
            try:
                with self._naming():
                    self._commit(table, found)
            except StorageError:  # it may have been committed nevertheless, or another commit came first
                if attempt == ATTEMPTS:
                    raise
            else:
                break
        return State.NEW

    def _compare(self, table: Any, found: FinishedFiles) -> State:
        """Compare the files that the table lists with those of a set that it was given before."""
        with self._naming():
            listed = pa.table(table.get_add_actions(flatten=True))
        paths = map(unquote, listed["path"].to_pylist())  # encoded once, as in the log
        sizes = dict(zip(paths, listed["size_bytes"].to_pylist(), strict=True))
        own = {action.path: action.size for action in self._build_actions(found, {})}
        if sizes.keys().isdisjoint(own):
            return State.ELSEWHERE
        if any(sizes.get(path) != size for path, size in own.items()):
            raise StorageError(
                f"{self._place.uri}: lists other versions of the files of {found.folder.uri}; remove them"
            )
        return State.LISTED

    def _commit(self, table: Any, found: FinishedFiles) -> None:
        from deltalake.transaction import create_table_with_add_actions

        partitions = self._find_partitions(found.folder)
        schema = self._api.Schema.from_arrow(_add_partitions(found.schema, partitions))
        actions, by = self._build_actions(found, partitions), list(partitions)
        once = self._api.CommitProperties(
            app_transactions=[self._api.Transaction(_name_application(found), 1)],
            custom_metadata={"selfrag.run": found.run, "selfrag.output": found.folder.uri},
            # A repeated creation would not notice the table that another publisher has made meanwhile.
            max_commit_retries=None if table is not None else 0,
        )
        if table is not None:
            table.create_write_transaction(actions, "append", schema, by, commit_properties=once)
            return
        create_table_with_add_actions(
            self._uri, schema, actions, partition_by=by, storage_options=self._options, commit_properties=once
        )

    def _open(self) -> Any:
        """Open the table; None if there is none.

        Raises:
            StorageError: it cannot be read.
        """
        with self._naming():
            if not self._api.DeltaTable.is_deltatable(self._uri, self._options):
                return None
            return self._api.DeltaTable(self._uri, storage_options=self._options)

    @contextmanager
    def _naming(self) -> Iterator[None]:
        """Turn what delta-rs raises, which has no common type, into one line that names the table."""
        try:
            yield
        except Exception as error:
            raise StorageError(f"{self._place.uri}: {describe_error(error)}") from error

    def _find_partitions(self, folder: Location) -> dict[str, str | None]:
        if ".." in [*folder.path.split("/"), *self._place.path.split("/")]:
            raise ValueError(
                f"publish.delta: name the output {folder.uri} and the table {self._place.uri} without '..'"
            )
        table = f"{self._place.path.rstrip('/')}/"
        if folder.filesystem != self._place.filesystem or not folder.path.startswith(table):
            raise ValueError(f"publish.delta: the output {folder.uri} must be below the table {self._place.uri}")
        return parse_partition(find_partition(folder / "data", self._place))

    def _build_actions(self, found: FinishedFiles, partitions: dict[str, str | None]) -> list[Any]:
        from deltalake.transaction import AddAction

        start = len(self._place.path.rstrip("/")) + 1
        return [
            AddAction(
                path=file.location.path[start:],
                size=file.location.stamp.size,
                partition_values=partitions,
                modification_time=file.location.stamp.mtime_ns // 10**6,
                data_change=True,
                stats=json.dumps({"numRecords": file.rows}),
            )
            for file in found.files
            if file.location.stamp  # listed files have one
        ]


def _name_application(found: FinishedFiles) -> str:
    return f"{APPLICATION}:{found.run}"


def _add_partitions(schema: pa.Schema, partitions: dict[str, str | None]) -> pa.Schema:
    return pa.schema([*schema, *(pa.field(name, pa.string()) for name in partitions)])


def _build_options(storage: StorageConfig) -> dict[str, str]:
    """Return the settings of an S3 store as delta-rs names them: https://delta-io.github.io/delta-rs/."""
    resolved = resolve_storage(storage)
    secrets = {
        "AWS_ACCESS_KEY_ID": resolved.access_key,
        "AWS_SECRET_ACCESS_KEY": resolved.secret_key,
        "AWS_SESSION_TOKEN": resolved.session_token,
    }
    options = {name: secret.get_secret_value() for name, secret in secrets.items() if secret}
    if resolved.access_key and not resolved.session_token and os.environ.get("AWS_SESSION_TOKEN"):
        # delta-rs would send the token of other credentials along.
        raise ValueError("publish.delta: AWS_SESSION_TOKEN does not belong to storage.access_key; unset it")
    if resolved.region:
        options["AWS_REGION"] = resolved.region
    if resolved.endpoint_url:
        options["AWS_ENDPOINT_URL"] = resolved.endpoint_url
        options["AWS_ALLOW_HTTP"] = str(resolved.endpoint_url.startswith("http://")).lower()
    return options
