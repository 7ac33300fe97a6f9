"""One run at a time on an output: a claim is a small file that its run rewrites while it is alive.

Correctness hardly rests on it: a unit that two runs annotate is written to one name by whoever is first, and one whose
two files do not add up to its rows is annotated again. It saves the GPU hours of the second. Object stores have no
locks that hold on all of them, so a claim is believed dead only when its process is gone (on the same machine) or when
it has not been rewritten while somebody watched.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType

from pipeline.storage.location import Location, MissingFileError, StorageError

log = logging.getLogger(__name__)

# Claims that this process holds: a store may show one that has just been deleted.
_HELD: set[str] = set()

# Seconds between two signs of life, and without one until a claim of another machine counts as dead.
BEAT, PATIENCE = 15.0, 50.0
# Seconds in which a run that saw no claim has written its own: then all that began together see each other.
SETTLE = 1.0


# Stays in the folder of claims: Arrow puts a marker where a folder's last file was deleted, and rclone's store makes a
# file of it, under which nothing can be written any more.
ANCHOR = "README"


class OutputTakenError(ValueError):
    """Another run is at work on the output."""


@dataclass(frozen=True)
class Owner:
    """Who made a claim.

    Attributes:
        born: start of its process in clock ticks since the machine's, so that a reused pid is known.
        beats: signs of life so far.
    """

    id: str
    host: str
    pid: int
    born: str
    started: float
    beats: int = 0

    @classmethod
    def me(cls) -> "Owner":
        """This process."""
        return cls(uuid.uuid4().hex, _machine(), os.getpid(), born(os.getpid()) or "", time.time())

    @property
    def seniority(self) -> tuple[float, str]:
        """Of two claims made at once the smaller one stays."""
        return self.started, self.id


class Claim:
    """This run's claim on an output folder, held while the context is.

    Raises:
        OutputTakenError: on entering, when another run is at work there.
    """

    def __init__(self, output: Location) -> None:
        self._output = output
        self._folder = output / "_running"
        self._owner = Owner.me()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="claim", daemon=True)

    def __enter__(self) -> "Claim":
        dead: list[Owner] = []
        while others := [other for other in self._others() if other.id not in {owner.id for owner in dead}]:
            dead += [self._dead(other) for other in others]
        if not self._folder.local:
            (self._folder / ANCHOR).write(b"Runs that are at work here leave their claims beside this file.\n")
        self._write()
        for other in dead:
            self._file(other).delete()
        time.sleep(SETTLE)
        if rivals := [other for other in self._others() if other.seniority < self._owner.seniority]:
            self._file(self._owner).delete()
            raise self._taken(rivals[0])
        self._thread.start()
        _HELD.add(self._owner.id)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        _HELD.discard(self._owner.id)
        try:
            self._file(self._owner).delete()
        except StorageError as problem:  # the run itself is over; the claim will be found dead
            log.warning("%s", problem)
        if self._folder.local:
            with contextlib.suppress(OSError):  # another run's claim is in it
                Path(self._folder.path).rmdir()

    def _file(self, owner: Owner) -> Location:
        return self._folder / f"{owner.id}.json"

    def _write(self) -> None:
        self._file(self._owner).write(json.dumps(asdict(self._owner)).encode())

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            self._owner = replace(self._owner, beats=self._owner.beats + 1)
            try:
                self._write()
            except StorageError as problem:
                log.warning("%s", problem)

    def _others(self) -> list[Owner]:
        found = (self._read(file) for file in self._folder.files(".json"))
        return [owner for owner in found if owner is not None and owner.id != self._owner.id]

    def _read(self, file: Location) -> Owner | None:
        try:
            return Owner(**json.loads(file.read()))
        except MissingFileError:
            return None

    def _dead(self, other: Owner) -> Owner:
        """The owner of a claim, who is dead.

        Raises:
            OutputTakenError: it lives.
        """
        if other.host == _machine():
            if born(other.pid) == other.born and (other.pid != os.getpid() or other.id in _HELD):
                raise self._taken(other)
        else:
            log.warning("%s: a run of %s was at work; watching it for %.0f s", self._output.uri, other.host, PATIENCE)
            until = time.monotonic() + PATIENCE
            while time.monotonic() < until:
                time.sleep(min(BEAT, PATIENCE) / 3)
                if (now := self._read(self._file(other))) is None:
                    break
                if now.beats != other.beats:
                    raise self._taken(other)
        return other

    def _taken(self, other: Owner) -> OutputTakenError:
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(other.started))
        return OutputTakenError(
            f"{self._output.uri}: another run is at work there (process {other.pid} on {other.host}, "
            f"since {since}); wait for its end"
        )


def born(pid: int) -> str | None:
    """When a process of this machine was started, in clock ticks; None where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _machine() -> str:
    """The machine's name with its last start: pids mean nothing beyond it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]
    except OSError:
        boot = "unknown"
    return f"{socket.gethostname()}/{boot}"
