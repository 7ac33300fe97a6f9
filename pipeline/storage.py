"""URIs → file systems. Files appear whole or not at all, on local disks and on object stores."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pyarrow import fs

from pipeline.config import StorageConfig


class StorageError(OSError):
    """A storage operation failed for good; the message names the URI."""


@dataclass(frozen=True)
class Location:
    """A place in a file system.

    Attributes:
        uri: as the user wrote it, for messages and manifests.
        path: the same within ``filesystem``.
    """

    uri: str
    filesystem: fs.FileSystem
    path: str

    @property
    def local(self) -> bool:
        """Whether it lies on a local disk."""
        return isinstance(self.filesystem, fs.LocalFileSystem)

    def __truediv__(self, name: str) -> "Location":
        return Location(f"{self.uri.rstrip('/')}/{name}", self.filesystem, f"{self.path.rstrip('/')}/{name}")

    def kind(self) -> fs.FileType:
        """File, directory or not found."""
        with _named(self.uri):
            return self.filesystem.get_file_info(self.path).type

    def exists(self) -> bool:
        """Whether there is a file or a folder."""
        return bool(self.kind() != fs.FileType.NotFound)

    def files(self, suffix: str = "") -> list["Location"]:
        """All files below this folder by name, hidden and underscored ones left out; none where it is missing."""
        with _named(self.uri):
            found = self.filesystem.get_file_info(fs.FileSelector(self.path, recursive=True, allow_not_found=True))
        base = self.path.rstrip("/")
        names = sorted(info.path[len(base) + 1 :] for info in found if info.type == fs.FileType.File)
        return [
            self / name
            for name in names
            if name.endswith(suffix) and not any(part.startswith((".", "_")) for part in name.split("/"))
        ]

    def read(self) -> bytes:
        """The whole file."""
        with _named(self.uri), self.filesystem.open_input_stream(self.path) as stream:
            return bytes(stream.read())

    def write(self, content: bytes) -> None:
        """Write a file at once: under a temporary name, synced and renamed on local disks; one PUT elsewhere."""
        with _named(self.uri):
            if self.local:
                _write_and_rename(Path(self.path), content)
                return
            with self.filesystem.open_output_stream(self.path) as stream:
                stream.write(content)

    def delete(self) -> None:
        """Delete a file."""
        with _named(self.uri):
            self.filesystem.delete_file(self.path)


@contextmanager
def _named(uri: str) -> Iterator[None]:
    """Turn an ``OSError`` inside into a ``StorageError`` that names the URI."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"{uri}: {' '.join(str(error).split())}") from error


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
    """Find the file system of a URI or local path.

    Raises:
        ValueError: no file system for the URI's scheme.
    """
    if "://" not in uri:
        return Location(uri, fs.LocalFileSystem(), str(Path(uri).expanduser().absolute()))
    if uri.startswith("s3://"):
        return Location(uri, _s3(storage), uri.removeprefix("s3://").rstrip("/"))
    try:
        filesystem, path = fs.FileSystem.from_uri(uri)
    except (ValueError, OSError) as error:
        raise ValueError(f"{uri}: {' '.join(str(error).split())}") from None
    return Location(uri, filesystem, path)


def _s3(storage: StorageConfig) -> fs.S3FileSystem:
    endpoint = storage.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    scheme, _, host = endpoint.partition("://") if endpoint else ("https", "", "")
    secret = {
        "access_key": storage.access_key,
        "secret_key": storage.secret_key,
        "session_token": storage.session_token,
    }
    return fs.S3FileSystem(
        **{name: value.get_secret_value() for name, value in secret.items() if value is not None},
        region=storage.region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"),
        endpoint_override=host or None,
        scheme=scheme,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=4),
        connect_timeout=10,
    )
