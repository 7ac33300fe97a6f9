"""Detect query files that are replaced during a run, whose answers would be a mixture of two sets."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from pyarrow import fs

from pipeline.storage.location import Location, Stamp


def check_version(uri: str, before: str | Stamp, now: str | Stamp) -> None:
    """Compare the versions, or stamps, of a file.

    Raises:
        ValueError: they differ.
    """
    if before != now:
        raise ValueError(
            f"{uri}: has changed since the run began, from {before} to {now}; if its rows are the same, run the same "
            "command again; otherwise choose another output, or pass --overwrite"
        )


@contextmanager
def reading_version(file: Location, version: str) -> Iterator[None]:
    """Check after reading a file that it still has a version: Arrow cannot name one when it reads a range of a file.

    Args:
        file: file that the body reads.
        version: version when the file was inspected.

    Raises:
        ValueError: the file has been replaced, also if it only looked damaged while that happened.
    """
    try:
        yield
    except ValueError:
        check_version(file.uri, version, file.get_version())
        raise
    check_version(file.uri, version, file.get_version())


@dataclass(frozen=True)
class Listing:
    """The files of a query set as they were listed before the run.

    Attributes:
        source: file or folder of the set.
        stamps: stamps of the files, by URI.
    """

    source: Location
    stamps: Mapping[str, Stamp]

    @classmethod
    def of(cls, source: Location, files: Sequence[Location]) -> "Listing":
        """Return the listing of files that were found in a source."""
        return cls(source, {file.uri: file.stamp for file in files if file.stamp})

    def check_unchanged(self) -> None:
        """List the files again, and compare sizes and modification times; files that were added do not count.

        Raises:
            ValueError: a file has been deleted or replaced; names it.
            StorageError: the storage cannot be listed.
        """
        now = Listing.of(self.source, self._list_again()).stamps
        for uri, stamp in self.stamps.items():
            if uri not in now:
                raise ValueError(f"{uri}: was deleted during the run; restore it, and run the same command again")
            check_version(uri, stamp, now[uri])

    def _list_again(self) -> list[Location]:
        if self.source.uri not in self.stamps:
            return self.source.list_files()
        info = self.source.get_info()
        return [self.source.with_stamp(info)] if info.type == fs.FileType.File else []
