"""Index files on this machine: in place where they are local, otherwise fetched once and kept up to a limit."""

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyarrow import fs

from pipeline.config import RetrievalConfig
from pipeline.storage import Location, StorageError

SCRATCH_PREFIX = ".building-"

REMEDY = "copy the whole index again, or build it anew"


class DamagedIndexError(ValueError):
    """A file of an index is missing or is not what the manifest says."""


def file_digest(path: Path) -> str:
    """SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def obtain(source: Location, size: int, sha256: str, retrieval: RetrievalConfig) -> Path:
    """A local path of an index file: itself where it is local, otherwise a copy that is fetched once per machine.

    A copy is named by its digest, so a changed index is another file. With ``retrieval.verify`` the whole file is
    read to check its digest each time; a copy that has just come always is.

    Args:
        size: in bytes, as the manifest says.

    Raises:
        DamagedIndexError: the file is missing or is not what the manifest says.
        StorageError: it cannot be fetched.
    """
    if source.local:
        check_file(Path(source.path), source.uri, size, sha256 if retrieval.verify else None)
        return Path(source.path)
    cache = Path(retrieval.cache).expanduser()
    cache.mkdir(parents=True, exist_ok=True)
    copy = cache / f"{sha256}-{Path(source.path).name}"
    # The lock makes several readers on one machine fetch a file once.
    with _locked(copy.with_name(f"{copy.name}.lock")):
        if copy.exists():
            check_file(copy, str(copy), size, sha256 if retrieval.verify else None)
        else:
            _fetch(source, copy, size, sha256)
        os.utime(copy)
    return copy


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def make_room(retrieval: RetrievalConfig, files: list[tuple[str, int, str]]) -> None:
    """Delete copies of other indexes, the longest unused first, until the files of this one fit into the limit.

    Who has a deleted file mapped keeps reading it: its blocks are freed when the last reader is gone.

    Args:
        files: name, size in bytes and digest of every file that the opener needs.

    Raises:
        ValueError: they are larger together than ``retrieval.cache_gb``.
    """
    if retrieval.cache_gb is None:
        return
    limit, needed = int(retrieval.cache_gb * 1e9), sum(size for _, size, _ in files)
    if needed > limit:
        raise ValueError(
            f"retrieval.cache_gb {retrieval.cache_gb:g}: this index has {needed / 1e9:.2f} GB of files; raise it, or "
            "set retrieval.topology to partitioned, so that each machine holds a part"
        )
    cache = Path(retrieval.cache).expanduser()
    cache.mkdir(parents=True, exist_ok=True)
    own = {f"{sha256}-{name}" for name, _, sha256 in files}
    with _locked(cache / ".evict.lock"):
        others = [file for file in cache.iterdir() if file.name not in own and _is_copy(file)]
        room = limit - needed - sum(file.stat().st_size for file in others)
        for file in sorted(others, key=lambda file: file.stat().st_mtime):
            if room >= 0:
                break
            room += file.stat().st_size
            file.unlink()


def _is_copy(file: Path) -> bool:
    digest, _, name = file.name.partition("-")
    return len(digest) == 64 and name.endswith((".faiss", ".arrow"))


def _fetch(source: Location, copy: Path, size: int, sha256: str) -> None:
    with tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX, dir=copy.parent) as scratch:
        arriving = Path(scratch) / copy.name
        try:
            fs.copy_files(source.path, str(arriving), source.filesystem, fs.LocalFileSystem())
        except FileNotFoundError:
            raise DamagedIndexError(f"{source.uri}: missing; {REMEDY}") from None
        except OSError as error:
            raise StorageError(f"{source.uri}: {' '.join(str(error).split())}") from error
        check_file(arriving, source.uri, size, sha256)
        shutil.move(arriving, copy)


def check_file(path: Path, uri: str, size: int, sha256: str | None) -> None:
    """Compare a local file with the manifest; its digest too where one is given.

    Raises:
        DamagedIndexError: missing, of another size or content; names the file.
    """
    if not path.is_file():
        raise DamagedIndexError(f"{uri}: missing; {REMEDY}")
    check_size(uri, path.stat().st_size, size)
    if sha256 is not None and file_digest(path) != sha256:
        raise DamagedIndexError(f"{uri}: its SHA-256 is not what index.json says; {REMEDY}")


def check_size(uri: str, found: int, size: int) -> None:
    """Compare a file's size with the manifest's.

    Raises:
        DamagedIndexError: they differ.
    """
    if found != size:
        raise DamagedIndexError(f"{uri}: has {found} bytes where index.json says {size}; {REMEDY}")
