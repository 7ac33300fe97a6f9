"""Register the files of a set in an Iceberg table: https://py.iceberg.apache.org/api/#add-files.

The catalog is configured as pyiceberg expects it: in ``.pyiceberg.yaml`` or ``PYICEBERG_CATALOG__NAME__…`` variables.
A run's snapshot has its digest among its properties, so that a table that has such a snapshot has the set. The lease on
the set keeps two publishers of one set apart, since pyiceberg repeats a commit that meets another one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from pipeline.publishing.published_set import FinishedFiles, find_difference
from pipeline.storage.location import Location, StorageError, join_lines

PROPERTY = "selfrag.run"


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
                raise ValueError(f"publish.iceberg {name}: {join_lines(error)}") from None
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

        if (table := self._open()) is None:
            return
        if difference := find_difference(schema, schema_to_pyarrow(table.schema())):
            raise ValueError(f"publish.{self.name}: {difference} of {folder.uri}; use another table")

    def publish(self, found: FinishedFiles) -> bool:
        """Register a set in one commit; returns whether it was new to the table.

        Raises:
            ValueError: see :meth:`check`.
            StorageError: the catalog or the table cannot be read or written.
        """
        self.check(found.folder, found.schema)
        with _naming(self.name):
            table = self._catalog.create_table_if_not_exists(self._table, schema=found.schema)
            if any((shot.summary or {}).get(PROPERTY) == found.run for shot in table.snapshots()):
                return False
            paths = [_get_uri(file.location) for file in found.files]
            table.add_files(paths, {PROPERTY: found.run, "selfrag.output": found.folder.uri})
        return True

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
        raise StorageError(f"{table}: {join_lines(error)}") from error


def _get_uri(file: Location) -> str:
    return f"file://{file.path}" if file.local else file.uri
