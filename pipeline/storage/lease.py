"""A lease keeps a second run off an output: a small file that the run rewrites as a heartbeat.

Correctness hardly depends on it: both runs would write a unit to the same name, and a unit whose files do not belong
together is annotated again. The lease saves the GPU hours of the second run. No lock works on every object store, so a
lease counts as expired only if its process is gone (on the same machine), or if no heartbeat was seen while this run
watched it. A run that was stopped for that long finds its lease gone, and ends.
"""

import contextlib
import json
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.storage.location import HIDDEN_S, Location, MissingFileError, StorageError

log = logging.getLogger(__name__)

# Leases that this process holds: a store may list one that has just been deleted.
_HELD: set[str] = set()

# Heartbeat interval, and seconds without a heartbeat after which a lease of another machine has expired.
HEARTBEAT_S, EXPIRY_S = 15.0, 50.0
# Seconds after a heartbeat for which nobody else can have taken over.
PERMIT_S = 0.8 * EXPIRY_S
# Seconds within which a run that saw no lease has written its own, so that runs that start together see each other.
SETTLE_S = 1.0


# Stays in the folder of leases: Arrow puts a marker where a folder's last file was deleted, and rclone's store makes a
# file of it, under which nothing can be written any more.
ANCHOR = "README"
ANCHOR_TEXT = b"Runs that use this folder keep their leases beside this file.\n"


class OutputInUseError(ValueError):
    """Another run is using the output."""


class LeaseLostError(RuntimeError):
    """Another run may be using the output, since this one's lease is gone."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a lease.

    Attributes:
        born: start time of the process in clock ticks since boot; tells a reused pid apart.
        beats: heartbeats so far.
    """

    id: str
    host: str
    pid: int
    born: str
    started: float
    beats: int = 0

    @classmethod
    def from_this_process(cls) -> "Holder":
        """Return a new holder for this process."""
        born = read_process_start(os.getpid()) or ""
        return cls(uuid.uuid4().hex, _identify_machine(), os.getpid(), born, time.time())

    @property
    def seniority(self) -> tuple[float, str]:
        """Order of leases that were made at once: the smallest one wins."""
        return self.started, self.id


class Lease:
    """This run's lease on an output folder, held while the context is.

    When a heartbeat finds that another run has taken over, it interrupts the main thread, and the context ends with
    :class:`LeaseLostError`.

    Attributes:
        on_renewal: called after every heartbeat, in another thread.

    Raises:
        OutputInUseError: on entering, if another run is using the folder.
        LeaseLostError: on leaving, if another run has taken over.
        ValueError: on entering, if the file of a lease is damaged or of another version.
    """

    def __init__(self, output: Location) -> None:
        self._output = output
        self._folder = output / "_running"
        self._holder = Holder.from_this_process()
        self._renewed = read_clock()
        self._lost: LeaseLostError | None = None
        self.on_renewal: Callable[[], Any] | None = None
        self._renewing = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._send_heartbeats, name="lease", daemon=True)

    def __enter__(self) -> "Lease":
        dead: dict[str, Holder] = {}
        while others := [other for other in self._list_others() if other.id not in dead]:
            for other in others:
                self._await_expiry(other)
                dead[other.id] = other
        if not self._folder.local:
            (self._folder / ANCHOR).write(ANCHOR_TEXT)
        try:
            self._claim(dead.values())
        except BaseException:  # such as an interruption, after which the next run must not wait
            self._locate(self._holder).delete()
            raise
        self._thread.start()
        _HELD.add(self._holder.id)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        _HELD.discard(self._holder.id)
        try:
            self._locate(self._holder).delete()
        except StorageError as problem:  # the run itself is over; the lease will expire
            log.warning("%s", problem)
        if self._folder.local:
            with contextlib.suppress(OSError):  # another run's lease is in it
                Path(self._folder.path).rmdir()
        if self._lost:
            raise self._lost from None

    def _claim(self, dead: Iterable[Holder]) -> None:
        """Write this run's lease in place of expired ones.

        Raises:
            OutputInUseError: another run has written its own at the same time, and comes first.
        """
        self._write()
        for other in dead:
            if self._read(self._locate(other)) not in (other, None):  # it was only slow
                raise self._build_in_use_error(other)
            self._locate(other).delete()
        time.sleep(SETTLE_S)
        if rivals := [other for other in self._list_others() if other.seniority < self._holder.seniority]:
            raise self._build_in_use_error(rivals[0])

    def _locate(self, holder: Holder) -> Location:
        return self._folder / f"{holder.id}.json"

    def _write(self) -> None:
        self._locate(self._holder).write(json.dumps(asdict(self._holder)).encode())

    def _send_heartbeats(self) -> None:
        while not self._over.wait(HEARTBEAT_S):
            try:
                self.renew()
            except LeaseLostError as loss:
                log.critical("%s", loss)
                self._lost = loss
                interrupt_main_thread()
                return
            except (StorageError, ValueError) as problem:
                log.warning("%s", problem)

    def renew(self) -> None:
        """Check that this run still holds its lease, and send a heartbeat.

        Raises:
            LeaseLostError: another run has taken over.
            StorageError: the storage cannot be reached.
        """
        with self._renewing:
            if self._read_own() != self._holder:
                raise LeaseLostError(self._describe_loss("its lease was deleted or replaced"))
            late = read_clock() - self._renewed > EXPIRY_S
            for other in self._list_others():
                # One without heartbeats is still starting, and gives way unless this run's lease looked expired.
                if late or (other.beats and other.seniority < self._holder.seniority):
                    raise LeaseLostError(self._describe_loss(f"process {other.pid} on {other.host} holds one too"))
            self._holder = replace(self._holder, beats=self._holder.beats + 1)
            self._write()
            self._renewed = read_clock()
        if self.on_renewal:
            self.on_renewal()

    @contextlib.contextmanager
    def moving(self) -> Iterator[None]:
        """Hold back heartbeats while the folder is replaced by another, then write the lease into that one.

        Raises:
            LeaseLostError: another run has taken over, and the folder must not be replaced.
        """
        with self._renewing:
            if self._read_own() != self._holder:
                raise LeaseLostError(self._describe_loss("its lease was deleted or replaced"))
            yield
            self._write()

    @property
    def is_fresh(self) -> bool:
        """Whether its last heartbeat is so recent that no other run can have taken over."""
        return self._lost is None and read_clock() - self._renewed < PERMIT_S

    def _read_own(self) -> Holder | None:
        found = self._read(self._locate(self._holder))
        if found is None and not self._folder.local:  # a store may hide it for a moment
            time.sleep(HIDDEN_S)
            found = self._read(self._locate(self._holder))
        return found

    def _describe_loss(self, reason: str) -> str:
        return f"{self._output.uri}: another run has taken over, since this one was stopped for a while ({reason})"

    def _list_others(self) -> list[Holder]:
        found = (self._read(file) for file in self._folder.list_files(".json"))
        return [holder for holder in found if holder is not None and holder.id != self._holder.id]

    def _read(self, file: Location) -> Holder | None:
        try:
            return Holder(**json.loads(file.read()))
        except MissingFileError:
            return None
        except (ValueError, TypeError):
            raise ValueError(
                f"{file.uri}: not the lease of a run, or one of another version; if no run uses the folder, delete it"
            ) from None

    def _await_expiry(self, other: Holder) -> None:
        """Wait until the lease of a holder has expired.

        Raises:
            OutputInUseError: the holder is alive.
        """
        if other.host == _identify_machine():
            if read_process_start(other.pid) == other.born and (other.pid != os.getpid() or other.id in _HELD):
                raise self._build_in_use_error(other)
            return
        warning = "%s: a run on %s holds a lease; waiting %.0f s for its heartbeat"
        log.warning(warning, self._output.uri, other.host, EXPIRY_S)
        until = time.monotonic() + EXPIRY_S
        while time.monotonic() < until:
            time.sleep(min(HEARTBEAT_S, EXPIRY_S) / 3)
            now = self._read(self._locate(other))
            if now is None:
                return
            if now.beats != other.beats:
                raise self._build_in_use_error(other)

    def _build_in_use_error(self, other: Holder) -> OutputInUseError:
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(other.started))
        return OutputInUseError(
            f"{self._output.uri}: another run is using this output (process {other.pid} on {other.host}, "
            f"since {since}); wait for it to finish"
        )


def interrupt_main_thread() -> None:
    """Send the main thread a signal that ends the program, if the program handles one."""
    for number in (signal.SIGTERM, signal.SIGINT):
        if callable(signal.getsignal(number)) and (main := threading.main_thread().ident):
            signal.pthread_kill(main, number)
            return


def read_clock() -> float:
    """Return the seconds since this machine started, including those in which it was suspended."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def read_process_start(pid: int) -> str | None:
    """Read the start time of a process of this machine, in clock ticks since boot; None if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _identify_machine() -> str:
    """Return the name of this machine with the id of its last boot: pids are not comparable across boots."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]
    except OSError:
        boot = "unknown"
    return f"{socket.gethostname()}/{boot}"
