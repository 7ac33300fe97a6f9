"""URIs → file systems. Files appear whole or not at all; what passes on object stores is waited for."""

import logging
import os
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import tenacity
from pyarrow import fs

from pipeline.config.sections import StorageConfig

log = logging.getLogger(__name__)

Result = TypeVar("Result")

# What no waiting mends: the request, the credentials or the name is wrong.
_PERMANENT = re.compile(
    r"ACCESS_DENIED|INVALID_ACCESS_KEY_ID|INVALID_CLIENT_TOKEN_ID|SIGNATURE_DOES_NOT_MATCH|UNRECOGNIZED_CLIENT|"
    r"EXPIRED_TOKEN|MISSING_AUTHENTICATION_TOKEN|NO_SUCH_|RESOURCE_NOT_FOUND|VALIDATION|INVALID_|HTTP status 4(?!08|29)"
)


class StorageError(OSError):
    """A storage operation failed for good; the message names the URI."""


class MissingFileError(StorageError):
    """There is no such file."""


@dataclass(frozen=True)
class Location:
    """A place in a file system.

    Attributes:
        uri: as the user wrote it, for messages and manifests.
        path: the same within ``filesystem``.
        patience_s: how long faults that pass are waited for.
    """

    uri: str
    filesystem: fs.FileSystem
    path: str
    patience_s: float = 0.0

    @property
    def name(self) -> str:
        """Last part of the path: the file's or folder's own name."""
        return self.path.rstrip("/").rpartition("/")[2]

    @property
    def local(self) -> bool:
        """Whether it lies on a local disk."""
        return isinstance(self.filesystem, fs.LocalFileSystem)

    def __truediv__(self, name: str) -> "Location":
        uri, path = f"{self.uri.rstrip('/')}/{name}", f"{self.path.rstrip('/')}/{name}"
        return Location(uri, self.filesystem, path, self.patience_s)

    def attempt(self, work: Callable[[], Result]) -> Result:
        """Do something with what is here; on object stores, again and again while a fault may pass.

        The SDK's own retries take some two seconds; outages, restarts and throttling take longer.

        Raises:
            MissingFileError: there is nothing here.
            StorageError: it failed for good; names the URI.
        """
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(passing),
            stop=tenacity.stop_after_delay(0 if self.local else self.patience_s),
            wait=tenacity.wait_exponential_jitter(multiplier=0.5, max=30),
            before_sleep=self._say,
            reraise=True,
        )
        try:
            return retrying(work)
        except StorageError:
            raise
        except FileNotFoundError as error:
            raise MissingFileError(f"{self.uri}: {one_line(error)}") from error
        except OSError as error:
            raise StorageError(f"{self.uri}: {one_line(error)}") from error

    def _say(self, state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        log.warning("%s: %s; trying again in %.1f s", self.uri, one_line(error), state.upcoming_sleep)

    def kind(self) -> fs.FileType:
        """File, directory or not found."""
        return self.attempt(lambda: self.filesystem.get_file_info(self.path).type)

    def exists(self) -> bool:
        """Whether there is a file or a folder."""
        return bool(self.kind() != fs.FileType.NotFound)

    def files(self, suffix: str = "") -> list["Location"]:
        """All files below this folder by name, hidden and underscored ones left out; none where it is missing."""
        selector = fs.FileSelector(self.path, recursive=True, allow_not_found=True)
        # Another run may remove a folder between pyarrow's look at it and its listing of it.
        again = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(FileNotFoundError), stop=tenacity.stop_after_attempt(9), reraise=True
        )
        found = self.attempt(lambda: again(self.filesystem.get_file_info, selector))
        base = self.path.rstrip("/")
        names = sorted(info.path[len(base) + 1 :] for info in found if info.type == fs.FileType.File)
        return [
            self / name
            for name in names
            if name.endswith(suffix) and not any(part.startswith((".", "_")) for part in name.split("/"))
        ]

    def read(self) -> bytes:
        """The whole file."""

        def work() -> bytes:
            with self.filesystem.open_input_stream(self.path) as stream:
                return bytes(stream.read())

        return self.attempt(work)

    def fetch(self, copy: Path) -> None:
        """Copy the file to this machine."""
        self.attempt(lambda: fs.copy_files(self.path, str(copy), self.filesystem, fs.LocalFileSystem()))

    def write(self, content: bytes) -> None:
        """Write a file at once: under a temporary name, synced and renamed on local disks; one PUT elsewhere."""

        def work() -> None:
            if self.local:
                _write_and_rename(Path(self.path), content)
                return
            with self.filesystem.open_output_stream(self.path) as stream:
                stream.write(content)

        self.attempt(work)

    def delete(self) -> None:
        """Delete a file; one that is not there is deleted already, by an attempt whose answer was lost perhaps."""

        def work() -> None:
            try:
                self.filesystem.delete_file(self.path)
            except OSError:
                # Arrow puts a marker where a folder's last file was, which some stores refuse.
                if self.filesystem.get_file_info(self.path).type != fs.FileType.NotFound:
                    raise

        self.attempt(work)


def passing(error: BaseException) -> bool:
    """Whether a fault of an object store may pass: no answer, an internal error, throttling, a broken connection.

    Arrow also raises ``OSError`` for damaged Parquet; what S3 itself says begins otherwise.
    """
    said = str(error)
    if type(error) is not OSError or "AWS Error" not in said:
        return False
    # Its answer may have been lost: then it is refused the second time, and the file is written once more.
    completing = "CompleteMultipartUpload" in said and "ACCESS_DENIED" not in said
    return completing or not _PERMANENT.search(said)


def one_line(error: BaseException | None) -> str:
    """What an error says, in one line."""
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
    """Find the file system of a URI or local path.

    Raises:
        ValueError: no file system for the URI's scheme.
    """
    if "://" not in uri:
        return Location(uri, fs.LocalFileSystem(), str(Path(uri).expanduser().absolute()))
    if uri.startswith("s3://"):
        return Location(uri, _s3(storage), uri.removeprefix("s3://").rstrip("/"), storage.patience_s)
    try:
        filesystem, path = fs.FileSystem.from_uri(uri)
    except (ValueError, OSError) as error:
        raise ValueError(f"{uri}: {one_line(error)}") from None
    return Location(uri, filesystem, path, storage.patience_s)


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
        request_timeout=60,
        allow_delayed_open=True,  # small files go in one PUT, not in three requests
    )


def check_apart(source: Location, output: Location) -> None:
    """Refuse an output inside of what is read, and the reverse.

    Raises:
        ValueError: one lies in the other.
    """
    one, other = f"{source.path.rstrip('/')}/", f"{output.path.rstrip('/')}/"
    if source.local == output.local and (one.startswith(other) or other.startswith(one)):
        raise ValueError(f"--output {output.uri} and {source.uri} lie in one another; choose another output")


def check_bucket(output: Location) -> None:
    """A missing folder is made when it is written to; a missing bucket is not.

    Raises:
        ValueError: the output's bucket is missing.
    """
    bucket = output.path.split("/", 1)[0]
    if not output.local and not Location(output.uri, output.filesystem, bucket).exists():
        raise ValueError(f"--output {output.uri}: no bucket {bucket!r} there")
