"""Files and folders at any URI.

A written file appears whole or not at all. Transient errors of object stores are retried with exponential backoff.
"""

import contextlib
import logging
import os
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
import tenacity
from pyarrow import fs

from pipeline.config.paths import find_existing, find_local_path, is_writable
from pipeline.config.sections import StorageConfig
from pipeline.storage.clouds import AZURE_SCHEMES, GOOGLE_SCHEMES, open_azure, open_google
from pipeline.storage.faults import advise, is_transient
from pipeline.storage.s3 import open_s3

log = logging.getLogger(__name__)

Result = TypeVar("Result")

# Seconds for which a store may hide the files of a folder after a deletion: rclone's with --dir-cache-time 1s.
HIDDEN_S = 1.5

# Bytes that Azure copies at once: https://learn.microsoft.com/en-us/rest/api/storageservices/copy-blob-from-url
AZURE_COPY_BYTES = 256 * 2**20


# A password before the host, or a secret among the parameters, as in URLs that contain a shared access signature.
_SECRET = re.compile(r"^\w+://[^/]*:[^/@]*@|[?&](?:sig|\w*(?:key|secret|token|password))=", re.IGNORECASE)


class StorageError(OSError):
    """A storage operation failed and is not retried any more; the message names the URI."""


class MissingFileError(StorageError):
    """The file does not exist."""


class Stamp(NamedTuple):
    """Size of a file in bytes, and its modification time in nanoseconds since the epoch."""

    size: int
    mtime_ns: int

    @classmethod
    def of(cls, info: fs.FileInfo) -> "Stamp":
        """Return the stamp of a file that was listed."""
        return cls(info.size or 0, info.mtime_ns or 0)

    def __str__(self) -> str:
        seconds, nanoseconds = divmod(self.mtime_ns, 10**9)
        return f"{self.size} bytes of {datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}.{nanoseconds:09}"


@dataclass(frozen=True)
class Location:
    """A file or folder, which need not exist.

    Attributes:
        uri: URI or path as the user wrote it, for messages and manifests; of a ``file:`` URI its path.
        filesystem: file system of the URI.
        path: path within the file system.
        patience_s: seconds for which transient errors are retried.
        stamp: size and modification time when the file was listed; None if it was not.
    """

    uri: str
    filesystem: fs.FileSystem
    path: str
    patience_s: float = 0.0
    stamp: Stamp | None = field(default=None, compare=False, repr=False)

    @property
    def name(self) -> str:
        """Last part of the path: the name of the file or folder."""
        return self.path.rstrip("/").rpartition("/")[2]

    @property
    def local(self) -> bool:
        """Whether the location is on a local disk."""
        return isinstance(self.filesystem, fs.LocalFileSystem)

    def __truediv__(self, name: str) -> "Location":
        uri, path = f"{self.uri.rstrip('/')}/{name}", f"{self.path.rstrip('/')}/{name}"
        return Location(uri, self.filesystem, path, self.patience_s)

    def retrying(self, work: Callable[[], Result]) -> Result:
        """Call a function that uses this location; retries transient errors of object stores with backoff.

        The SDK's own retries cover about two seconds; outages, restarts and throttling last longer.

        Raises:
            MissingFileError: the file does not exist.
            StorageError: the error is permanent, or lasted longer than ``patience_s``; the message names the URI.
        """
        attempts = tenacity.Retrying(
            retry=tenacity.retry_if_exception(is_transient),
            stop=tenacity.stop_after_delay(0 if self.local else self.patience_s),
            wait=tenacity.wait_exponential_jitter(multiplier=0.5, max=30),
            before_sleep=self._log_retry,
            reraise=True,
        )
        try:
            return attempts(work)
        except StorageError:
            raise
        except FileNotFoundError as error:
            raise MissingFileError(f"{self.uri}: {join_lines(error)}") from error
        except OSError as error:
            raise StorageError(f"{self.uri}: {join_lines(error)}{advise(error)}") from error
        except pa.ArrowException as error:
            # Errors of Azure's client, such as refused credentials, have no more specific type.
            if self.local or type(error) is not pa.ArrowException:
                raise
            raise StorageError(f"{self.uri}: {join_lines(error)}{advise(error)}") from error

    def _log_retry(self, state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        left = max(0.0, self.patience_s - (state.seconds_since_start or 0.0))
        known = (self.uri, join_lines(error), state.upcoming_sleep, left)
        log.warning("%s: %s; retrying in %.1f s, for up to %.0f s (storage.patience_s)", *known)

    def get_info(self) -> fs.FileInfo:
        """Return type, size and modification time of the location."""
        return self.retrying(lambda: self.filesystem.get_file_info(self.path))

    def get_type(self) -> fs.FileType:
        """Return the type of the location: file, directory or not found."""
        return self.get_info().type

    def with_stamp(self, info: fs.FileInfo) -> "Location":
        """Return the location with the size and modification time of a listing."""
        return replace(self, stamp=Stamp.of(info))

    def read_version(self, stream: Any) -> str:
        """Return a text that differs after the file is replaced: its size and its ETag, or its modification time.

        Arrow gets the ETag of S3, Azure and Google Cloud Storage by the request that opens the file.

        Args:
            stream: the file, opened by ``filesystem.open_input_file``.
        """
        tags = [value for key, value in (stream.metadata() or {}).items() if key.lower() == "etag"]
        if tags:
            return f"{stream.size()} bytes with ETag {tags[0].decode()}"
        return str(Stamp.of(self.filesystem.get_file_info(self.path)))

    def get_version(self) -> str:
        """Return the version of the file, as :meth:`read_version` does."""

        def read_version() -> str:
            with self.filesystem.open_input_file(self.path) as stream:
                return self.read_version(stream)

        return self.retrying(read_version)

    def exists(self) -> bool:
        """Whether the file or folder exists."""
        return bool(self.get_type() != fs.FileType.NotFound)

    def list_files(self, suffix: str = "") -> list["Location"]:
        """List the files below this folder, sorted by name; empty if the folder is missing.

        Files and folders whose names start with a dot or an underscore are left out.

        Args:
            suffix: end of the names of the files to list.
        """
        selector = fs.FileSelector(self.path, recursive=True, allow_not_found=True)
        # Another run may delete a folder between the moments when pyarrow finds and lists it.
        again = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(FileNotFoundError), stop=tenacity.stop_after_attempt(9), reraise=True
        )
        found = self.retrying(lambda: again(self.filesystem.get_file_info, selector))
        base = self.path.rstrip("/")
        infos = {info.path[len(base) + 1 :]: info for info in found if info.type == fs.FileType.File}
        names = [name for name in sorted(infos) if name.endswith(suffix) and not is_hidden(name)]
        return [(self / name).with_stamp(infos[name]) for name in names]

    def list_folders(self) -> list["Location"]:
        """List the folders in this folder, sorted by name, without hidden ones; empty if it is missing."""
        # Arrow lists no folders of Google's store, which has none, so they are read from the paths of all files.
        recursive = isinstance(self.filesystem, fs.GcsFileSystem)
        selector = fs.FileSelector(self.path, allow_not_found=True, recursive=recursive)
        found = self.retrying(lambda: self.filesystem.get_file_info(selector))
        inside = [(info.path[len(self.path.rstrip("/")) + 1 :].partition("/"), info) for info in found]
        names = {name for (name, slash, _), info in inside if slash or info.type == fs.FileType.Directory}
        return [self / name for name in sorted(names) if not is_hidden(name)]

    def read(self) -> bytes:
        """Read the whole file."""

        def read_stream() -> bytes:
            with self.filesystem.open_input_stream(self.path) as stream:
                return bytes(stream.read())

        return self.retrying(read_stream)

    def fetch(self, copy: Path) -> None:
        """Copy the file to a local path."""
        self.retrying(lambda: fs.copy_files(self.path, str(copy), self.filesystem, fs.LocalFileSystem()))

    def write(self, content: bytes) -> None:
        """Write a file atomically.

        On a local disk the file is written under a temporary name, synced and renamed; on an object store it appears
        when its upload completes, which is one PUT for a small file. On Azure, where Arrow makes an empty file first,
        it is written under a temporary name and copied, if it is not larger than ``AZURE_COPY_BYTES``.
        """

        def write_content() -> None:
            if self.local:
                _write_and_rename(Path(self.path), content)
            elif isinstance(self.filesystem, fs.AzureFileSystem) and len(content) <= AZURE_COPY_BYTES:
                self._write_and_copy(content)
            else:
                self._stream(self.path, content)

        self.retrying(write_content)

    def _stream(self, path: str, content: bytes) -> None:
        with self.filesystem.open_output_stream(path) as stream:
            stream.write(content)

    def _write_and_copy(self, content: bytes) -> None:
        folder, _, name = self.path.rpartition("/")
        temporary = f"{folder}/.{name}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            self._stream(temporary, content)
            self.filesystem.copy_file(temporary, self.path)
        finally:
            with contextlib.suppress(OSError):  # a hidden file may stay
                self.filesystem.delete_file(temporary)

    def delete(self) -> None:
        """Delete the file; a missing file is no error: an earlier attempt may have deleted it and lost the response."""

        def delete_file() -> None:
            try:
                self.filesystem.delete_file(self.path)
            except OSError:
                # Arrow writes a directory marker after a deletion. rclone's store refuses it, and then says for a while
                # that no file of the folder exists.
                time.sleep(0 if self.local else HIDDEN_S)
                if self.filesystem.get_file_info(self.path).type != fs.FileType.NotFound:
                    raise

        again = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(FileNotFoundError), stop=tenacity.stop_after_attempt(3), reraise=True
        )
        self.retrying(lambda: again(delete_file))


def is_hidden(path: str) -> bool:
    """Whether a path within a folder has a part that starts with a dot or an underscore."""
    return any(part.startswith((".", "_")) for part in path.split("/"))


def join_lines(error: object) -> str:
    """Return the message of an error, or any text, on one line."""
    return " ".join(str(error).split())


def _write_and_rename(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


def locate(uri: str, storage: StorageConfig) -> Location:
    """Resolve a URI or local path to its file system and the path in it.

    Raises:
        ValueError: there is no file system for the URI's scheme, it cannot be opened, or the URI names no bucket or
            contains a secret.
        StorageError: there are no credentials.
    """
    if (local := find_local_path(uri)) is not None:
        # The names of files are appended to the path as they are, so a ``file:`` URI, in which they would be encoded,
        # is replaced by its path.
        return Location(str(local) if uri.lower().startswith("file:") else uri, fs.LocalFileSystem(), str(local))
    _refuse_secrets(uri)
    if not uri.partition("://")[2].strip("/"):
        raise ValueError(f"{uri}: names no bucket")
    if uri.startswith("s3://"):
        return Location(uri, open_s3(storage), uri.removeprefix("s3://").rstrip("/"), storage.patience_s)
    return Location(uri, *_open_other(uri, storage), storage.patience_s)


def _refuse_secrets(uri: str) -> None:
    if _SECRET.search(uri):
        scheme = uri.partition("://")[0]
        raise ValueError(f"{scheme}://…: the URI contains a password or a key, which would be logged; leave it out")


def _open_other(uri: str, storage: StorageConfig) -> tuple[fs.FileSystem, str]:
    if uri.startswith(GOOGLE_SCHEMES):
        return open_google(uri)
    if uri.startswith(AZURE_SCHEMES):
        try:
            return open_azure(uri, storage)
        except (OSError, pa.ArrowException) as error:
            raise StorageError(f"{uri}: {join_lines(error)}{advise(error)}") from None
    try:
        filesystem, path = fs.FileSystem.from_uri(uri)
    except (ValueError, OSError, pa.ArrowException) as error:
        raise ValueError(f"{uri}: {_explain_unopened(error)}") from None
    return filesystem, path


def _explain_unopened(error: Exception) -> str:
    """Return the reason why a file system cannot be opened; Arrow lists each folder without HDFS's libraries."""
    reason = join_lines(error)
    if "libjvm" not in reason and "libhdfs" not in reason:
        return reason
    return (
        "HDFS needs Java and Hadoop's client on every machine; set JAVA_HOME, HADOOP_HOME and CLASSPATH (the output of "
        "hadoop classpath --glob), or copy the files to another store"
    )


def check_apart(source: Location, output: Location) -> None:
    """Check that neither the source nor the output contains the other.

    Raises:
        ValueError: one contains the other, or they are the same.
    """
    one, other = f"{source.path.rstrip('/')}/", f"{output.path.rstrip('/')}/"
    if source.filesystem == output.filesystem and (one.startswith(other) or other.startswith(one)):
        raise ValueError(f"--output {output.uri} and {source.uri}: one contains the other; choose another output")


def check_writable(output: Location) -> None:
    """Check that the output's bucket exists or, on a local disk, that this user can write to its folder or create it.

    A write creates missing folders but no bucket.

    Raises:
        ValueError: the bucket does not exist, or the folder or its nearest existing parent cannot be written to.
    """
    if output.local and not is_writable(Path(output.path)):
        folder = find_existing(Path(output.path))
        if folder.is_file():
            raise ValueError(f"--output {output.uri}: {folder} is a file; name a folder")
        raise ValueError(
            f"--output {output.uri}: this user cannot create files in {folder}; choose another output, or change "
            "its permissions"
        )
    bucket = output.path.split("/", 1)[0]
    if not output.local and not Location(output.uri, output.filesystem, bucket).exists():
        raise ValueError(f"--output {output.uri}: the store has no bucket {bucket!r}")
