"""Register the files of a set in an Iceberg table: https://py.iceberg.apache.org/api/#add-files.

The catalog is configured as pyiceberg expects it: in ``.pyiceberg.yaml`` or ``PYICEBERG_CATALOG__NAME__…`` variables.
The commit that adds the files of a run also adds its digest to the table's properties, which outlive snapshots. The
lease on the set keeps two publishers of one set apart, since pyiceberg repeats a commit that meets another one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from pipeline.publishing.published_set import (
    FinishedFiles,
    State,
    check_table_columns,
    describe_error,
    find_difference,
)
from pipeline.storage.location import Location, StorageError

# Property of the table for each run, with the folder of its set.
PROPERTY = "selfrag.run."


class IcebergTable:
    """An Iceberg table that may not exist yet.

    Args:
        name: catalog and table, such as ``prod.answers.nightly``.

    Raises:
        ValueError: the package pyiceberg is missing, the name has too few parts, or there is no such catalog or
            namespace.
        StorageError: the catalog cannot be reached.
    """

    def __init__(self, name: str) -> None:
        try:
            from pyiceberg.catalog import load_catalog
        except ImportError:
            raise ValueError(
                "publish.iceberg needs the package pyiceberg: pip install 'selfrag-batch[iceberg]'"
            ) from None
        catalog, _, self._table = name.partition(".")
        if "." not in self._table.strip("."):
            raise ValueError(f"publish.iceberg {name}: expected CATALOG.NAMESPACE.TABLE")
        self.name = f"iceberg {name}"
        with _naming(self.name):
            try:
                self._catalog: Any = load_catalog(catalog)
            except ValueError as error:  # nothing says where it is
                raise ValueError(f"publish.iceberg {name}: {describe_error(error)}") from None
            if not self._catalog.namespace_exists(self._table.rpartition(".")[0]):
                raise ValueError(f"publish.iceberg {name}: the catalog has no such namespace; create it first")

    def check(self, folder: Location, schema: pa.Schema) -> None:
        """Check that a set can be registered: its columns must be those of the table, if there is one.

        Args:
            folder: folder of the set, which need not exist.
            schema: schema of its rows.

        Raises:
            ValueError: a column differs; names it.
            StorageError: the catalog or the table cannot be read.
        """
        from pyiceberg.io.pyarrow import schema_to_pyarrow

        check_table_columns(schema)
        if folder.local and set(folder.path) & set("#?"):
            raise ValueError(f"publish.{self.name}: pyiceberg reads no path with # or ?: {folder.uri}")
        if (table := self._open()) is None:
            return
        if difference := find_difference(schema, schema_to_pyarrow(table.schema())):
            raise ValueError(f"publish.{self.name}: {difference} of {folder.uri}; use another table")
        if required := [field.name for field in table.schema().fields if field.required]:
            raise ValueError(f"publish.{self.name}: requires values of {required[0]!r}; use another table")
        if not table.spec().is_unpartitioned():
            raise ValueError(f"publish.{self.name}: is partitioned; use another table")

    def publish(self, found: FinishedFiles) -> State:
        """Register a set in one commit, if the table does not have it.

        Raises:
            ValueError: see :meth:`check`.
            StorageError: the catalog or the table cannot be read or written, or lists a part of the set's files.
        """
        self.check(found.folder, found.schema)
        paths = {_get_uri(file.location) for file in found.files}
        with _naming(self.name):
            table = self._catalog.create_table_if_not_exists(self._table, schema=found.schema)
            if f"{PROPERTY}{found.run}" in table.properties:
                listed = paths & set(table.inspect.data_files()["file_path"].to_pylist())
                if listed and listed != paths:
                    raise StorageError(
                        f"{self.name}: lists only a part of the files of {found.folder.uri}; remove them"
                    )
                return State.LISTED if listed else State.ELSEWHERE
            with table.transaction() as commit:
                commit.set_properties({f"{PROPERTY}{found.run}": found.folder.uri})
                commit.add_files(sorted(paths))
        return State.NEW

    def _open(self) -> Any:
        with _naming(self.name):
            return self._catalog.load_table(self._table) if self._catalog.table_exists(self._table) else None


@contextmanager
def _naming(table: str) -> Iterator[None]:
    """Turn what pyiceberg, its catalogs and file systems raise into one line that names the table."""
    try:
        yield
    except (ValueError, StorageError):
        raise
    except Exception as error:
        raise StorageError(f"{table}: {describe_error(error)}") from error


def _get_uri(file: Location) -> str:
    return f"file://{file.path}" if file.local else file.uri
