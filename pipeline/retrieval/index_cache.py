"""Provides index files on this machine: local ones in place, remote ones from a cache with a maximum size."""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from pipeline.config.paths import expand_home
from pipeline.config.sections import RetrievalConfig
from pipeline.storage.location import Location, MissingFileError

SCRATCH_PREFIX = ".building-"

REMEDY = "copy the whole index again, or rebuild it"


# Name, size in bytes, SHA-256 in hex.
CachedFile = tuple[str, int, str]


class DamagedIndexError(ValueError):
    """Error for an index file that is missing, unreadable, or not the expected one."""


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def obtain_file(source: Location, size: int, sha256: str, retrieval: RetrievalConfig) -> Path:
    """Return the local path of an index file: its own, or that of a copy that is fetched once per machine.

    Copies are named by digest, so a changed index gets new ones. The size is checked at every call. The digest, which
    takes reading the whole file, is checked after fetching, and at every call with ``retrieval.verify``.

    Args:
        source: the index file.
        size: size in bytes according to the manifest.
        sha256: digest in hex according to the manifest.

    Raises:
        DamagedIndexError: the file is missing, or differs from the manifest.
        StorageError: the file cannot be fetched.
    """
    if source.local:
        check_file(Path(source.path), source.uri, size, sha256 if retrieval.verify else None)
        return Path(source.path)
    cache = expand_home(retrieval.cache)
    cache.mkdir(parents=True, exist_ok=True)
    copy = cache / _name_copy((source.path, size, sha256))
    # The lock ensures that concurrent readers on one machine fetch a file only once.
    with _locking(copy.with_name(f"{copy.name}.lock")):
        fetched = not copy.exists()
        if fetched:
            _fetch(source, copy, size, sha256)
        os.utime(copy)
    if not fetched:  # outside the lock, so that readers check concurrently
        check_file(copy, str(copy), size, sha256 if retrieval.verify else None)
    return copy


@contextmanager
def _locking(path: Path, how: int = fcntl.LOCK_EX) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, how)
        yield


@contextmanager
def reserve_room(retrieval: RetrievalConfig, wanted: list[CachedFile], others: list[CachedFile]) -> Iterator[None]:
    """Make room in the cache for the files that the body opens; meanwhile no other process evicts files.

    Does nothing unless ``retrieval.cache_gb`` is set. Copies of other indexes are evicted, least recently used first. A
    process that has mapped an evicted file can still read it: its blocks are freed when the last process has closed it.

    Args:
        wanted: files that the body opens.
        others: other files of the same index, which are never evicted: shard servers on this machine may use them.

    Raises:
        ValueError: the wanted files, and those of the others that are in the cache, exceed ``retrieval.cache_gb``.
    """
    if retrieval.cache_gb is None:
        yield
        return
    cache = expand_home(retrieval.cache)
    cache.mkdir(parents=True, exist_ok=True)
    with _locking(cache / ".room.lock"):
        _make_room(cache, int(retrieval.cache_gb * 1e9), wanted, others)
    with _locking(cache / ".room.lock", fcntl.LOCK_SH):
        yield


def _make_room(cache: Path, limit: int, wanted: list[CachedFile], others: list[CachedFile]) -> None:
    own = {_name_copy(file) for file in [*wanted, *others]}
    present = sum(file[1] for file in others if (cache / _name_copy(file)).exists())
    needed = present + sum(size for _, size, _ in wanted)
    if needed > limit:
        raise ValueError(
            f"retrieval.cache_gb {limit / 1e9:g}: the files of this index on this machine take {needed / 1e9:.2f} GB; "
            "raise it, or set retrieval.topology to partitioned, so that each machine holds a part"
        )
    foreign = [file for file in cache.iterdir() if file.name not in own and _is_copy(file)]
    room = limit - needed - sum(file.stat().st_size for file in foreign)
    for file in sorted(foreign, key=lambda file: file.stat().st_mtime):
        if room >= 0:
            break
        room += file.stat().st_size
        file.unlink()


def _name_copy(file: CachedFile) -> str:
    name, _, sha256 = file
    return f"{sha256}-{PurePosixPath(name).name}"


def _is_copy(file: Path) -> bool:
    digest, _, name = file.name.partition("-")
    return len(digest) == 64 and name.endswith((".faiss", ".arrow"))


def _fetch(source: Location, copy: Path, size: int, sha256: str) -> None:
    """Fetch a file. The caller holds its lock, so a file at the temporary name is left from a killed process."""
    arriving = copy.with_name(f".{copy.name}.arriving")
    try:
        source.fetch(arriving)
        check_file(arriving, source.uri, size, sha256)
        arriving.rename(copy)
    except MissingFileError:
        raise DamagedIndexError(f"{source.uri}: missing; {REMEDY}") from None
    finally:
        arriving.unlink(missing_ok=True)


def check_file(path: Path, uri: str, size: int, sha256: str | None) -> None:
    """Compare a local file with the manifest by size, and by digest unless ``sha256`` is None.

    Raises:
        DamagedIndexError: the file is missing, or its size or digest differs; the message names the file.
    """
    if not path.is_file():
        raise DamagedIndexError(f"{uri}: missing; {REMEDY}")
    check_size(uri, path.stat().st_size, size)
    if sha256 is not None and hash_file(path) != sha256:
        raise DamagedIndexError(f"{uri}: its SHA-256 differs from index.json; {REMEDY}")


def check_size(uri: str, found: int, size: int) -> None:
    """Compare a file's size with the manifest's.

    Raises:
        DamagedIndexError: the sizes differ; the message names the file.
    """
    if found != size:
        raise DamagedIndexError(f"{uri}: has {found} bytes, but index.json records {size}; {REMEDY}")
