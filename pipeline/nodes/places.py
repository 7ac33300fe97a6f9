"""Try out whether this machine reads the files of a run and writes to its output."""

import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Self

from pipeline.config.paths import find_local_path
from pipeline.config.sections import StorageConfig
from pipeline.storage.lease import ANCHOR, ANCHOR_TEXT
from pipeline.storage.location import Location, StorageError, join_lines, locate

SHARE = "use a folder that all machines share, or an object store such as s3://"
COPY = "copy the same files to every machine, or use a shared folder or an object store"
GRANT = "give this machine the same credentials, role or profile as the driver's, or set those of storage"
# Prefix of the names of hidden folders.
HIDDEN = ".nodes-"


class Refusal(NamedTuple):
    """An access that a machine lacks.

    Attributes:
        option: option or setting of the path.
        uri: the path.
        problem: what fails, after the name of the machine.
        remedy: what to do.
    """

    option: str
    uri: str
    problem: str
    remedy: str

    def explain(self, node: str) -> str:
        """Return the message for a machine."""
        return f"{self.option} {self.uri}: node {node} {self.problem}; {self.remedy}"


@dataclass(frozen=True)
class Source:
    """Files that every machine must read.

    Attributes:
        option: option or setting that names them, for messages.
        files: size in bytes by URI. All local ones are compared, and one of an object store is opened.
    """

    option: str
    files: Mapping[str, int]

    @classmethod
    def list_folder(cls, option: str, folder: str, sample: str) -> Self:
        """List the files of a folder.

        Args:
            folder: path or URI. Hidden files are left out.
            sample: name of the file that is opened if the folder is not local.
        """
        local = find_local_path(folder)
        if local is None:
            return cls(option, {f"{folder.rstrip('/')}/{sample}": 0})
        found = (file for file in sorted(local.rglob("*")) if file.is_file())
        shown = (file for file in found if not _is_hidden(file.relative_to(local)))
        return cls(option, {str(file): file.stat().st_size for file in shown})

    def find_refusal(self, storage: StorageConfig) -> Refusal | None:
        """Return what this machine cannot read, if anything."""
        remote = []
        for uri, size in self.files.items():
            local = find_local_path(uri)
            if local is None:
                remote.append(uri)
            elif (problem := _find_difference(local, size)) is not None:
                return Refusal(self.option, uri, problem, COPY)
        return _try_reading(self.option, locate(remote[0], storage)) if remote else None


def _is_hidden(path: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)


def _find_difference(file: Path, size: int) -> str | None:
    try:
        found = file.stat().st_size
    except OSError as error:
        return f"does not see this file ({error.strerror})"
    if found != size:
        return f"sees another file there, of {found} instead of {size} bytes"
    return None if os.access(file, os.R_OK) else "may not read this file"


def _try_reading(option: str, file: Location) -> Refusal | None:
    def read_byte() -> None:
        with file.filesystem.open_input_stream(file.path, buffer_size=None) as stream:
            stream.read(1)

    try:
        file.retrying(read_byte)
    except StorageError as error:
        return Refusal(option, file.uri, f"cannot read it ({_describe(error, file.uri)})", GRANT)
    return None


def _describe(error: StorageError, uri: str) -> str:
    return join_lines(error).removeprefix(f"{uri}: ")


@dataclass(frozen=True)
class Output:
    """A folder that every machine must write to.

    A local one gets a hidden folder while the run lasts, by which machines recognize it, and into which they write.

    Attributes:
        uri: path or URI.
        token: random name of the hidden folder.
    """

    uri: str
    token: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def hidden(self) -> Path | None:
        """The hidden folder; None if the output is not local."""
        local = find_local_path(self.uri)
        return local and local / f"{HIDDEN}{self.token}"

    def prepare(self) -> None:
        """Make the hidden folder, and remove those of runs that were killed."""
        if self.hidden is not None:
            self.clear()
            self.hidden.mkdir(parents=True)
            (self.hidden / "driver").write_text(self.token)

    def clear(self) -> None:
        """Remove the hidden folder."""
        if self.hidden is not None:
            for folder in self.hidden.parent.glob(f"{HIDDEN}*"):
                shutil.rmtree(folder, ignore_errors=True)

    def has_reply(self, node: str) -> bool:
        """Whether this machine sees what another one has written."""
        return self.hidden is None or (self.hidden / node).exists()

    def find_refusal(self, node: str, storage: StorageConfig) -> Refusal | None:
        """Return what this machine, named ``node``, cannot write, if anything."""
        if self.hidden is None:
            return self._try_store(locate(self.uri, storage))
        try:
            seen = (self.hidden / "driver").read_text()
        except OSError:
            seen = ""
        if seen != self.token:
            return self.refuse("does not see this folder, or sees another one", SHARE)
        try:
            (self.hidden / node).write_text(self.token)
        except OSError as error:
            return self.refuse(f"cannot write to it ({error.strerror})", "change its permissions")
        return None

    def _try_store(self, output: Location) -> Refusal | None:
        """Write a file that is there as long as a lease is held, so that nothing has to be deleted."""
        anchor = output / "_running" / ANCHOR
        try:
            anchor.write(ANCHOR_TEXT)
        except StorageError as error:
            return self.refuse(f"cannot write to it ({_describe(error, anchor.uri)})", GRANT)
        return None

    def refuse(self, problem: str, remedy: str) -> Refusal:
        """Return a refusal of this folder."""
        return Refusal("--output", self.uri, problem, remedy)
