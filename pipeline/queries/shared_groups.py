"""Keep the readers of row groups that several units share."""

import threading
from collections.abc import Callable, Hashable

import pyarrow as pa

from pipeline.storage.parquet import GroupReader

# Units that start at the same time may be read in another order: then one reader goes ahead, and one follows.
READERS = 2


class SharedGroups:
    """The last readers of row groups; thread-safe."""

    def __init__(self) -> None:
        # The units of an actor start at the same time: only one of them reads.
        self._reading = threading.Lock()
        self._readers: list[tuple[Hashable, GroupReader]] = []

    def read(self, key: Hashable, open_group: Callable[[], GroupReader], offset: int, rows: int) -> pa.Table:
        """Read rows of a row group with the reader that is nearest to them, or a new one if all have passed them.

        Args:
            key: identity of the row group.
            open_group: opens a new reader of it.
            offset: first row.
            rows: number of rows.
        """
        with self._reading:
            reader = self._take(key, offset) or open_group()
            table = reader.read(offset, rows)
            self._readers = [*self._readers, (key, reader)][-READERS:]  # not if it has failed
        return table

    def _take(self, key: Hashable, offset: int) -> GroupReader | None:
        fitting = [(other, reader) for other, reader in self._readers if other == key and reader.start <= offset]
        if not fitting:
            return None
        taken = max(fitting, key=lambda pair: pair[1].start)
        self._readers.remove(taken)
        return taken[1]
