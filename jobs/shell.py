"""Start commands: output that every terminal can show, and one line and a status for a command that is interrupted."""

import io
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from types import FrameType
from typing import Any, NoReturn

import typer

# Sent by Ctrl-C; and by ``kill``, ``ray job stop`` and Kubernetes.
SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Seconds in which the main thread handles a signal, unless it waits in C++ code, such as Arrow's for a store.
PATIENCE_S = 10.0
# Seconds in which it does so after a second signal: two may arrive almost at once.
GRACE_S = 1.0

log = logging.getLogger(__name__)

# A signal has been handled; one is deferred; one has ended the command.
_handled, _deferred, _ended = threading.Event(), threading.Event(), threading.Event()


class Interrupted(SystemExit):
    """SIGINT or SIGTERM has reached the command, which ends with status 130 or 143.

    Attributes:
        resumable: whether the same command continues the work.
        overwrite: whether only the command without ``--overwrite`` does.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.resumable, self.overwrite = False, False


class Application(typer.Typer):
    """An application whose commands can be interrupted, and print in any encoding."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command that the arguments of this process select; see :class:`typer.Typer`."""
        replace_unprintable()
        handle_signals()
        try:
            return super().__call__(*args, **kwargs)
        except Interrupted as end:
            typer.echo(
                f"interrupted; {name_command(end.overwrite)} continues it" if end.resumable else "interrupted", err=True
            )
            raise


def name_command(overwrite: bool) -> str:
    """Return words for the command that continues the work of this one."""
    return "the same command without --overwrite" if overwrite else "the same command"


def run(job: Callable[..., None]) -> None:
    """Run a job's function as the command of this process, for ``python -m jobs.NAME``."""
    app = Application(add_completion=False)
    app.command()(job)
    app()


def replace_unprintable() -> None:
    r"""Print characters that the output's encoding lacks in the form ``\u2026``, instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def handle_signals() -> None:
    """Raise :class:`Interrupted` on SIGINT or SIGTERM, so that a job releases what it holds.

    A second signal ends the process at once. If the main thread does not handle the first one, the process ends after
    ``PATIENCE_S`` without releasing anything. An ignored signal stays ignored, as after ``nohup``.
    """
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _interrupt)
    received, noting = os.pipe()
    os.set_blocking(noting, False)
    signal.set_wakeup_fd(noting, warn_on_full_buffer=False)
    # A forked child writes its own signals into the same pipe.
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    threading.Thread(target=_end_unless_handled, args=(received,), name="signals", daemon=True).start()


def _end_unless_handled(received: int) -> None:
    """End the process if the main thread does not handle its signals, whose numbers are read from a pipe."""
    while not _ended.is_set():
        number = os.read(received, 1)[0]
        if number in SIGNALS and not _deferred.is_set():
            select.select([received], [], [], PATIENCE_S)
            if not _ended.is_set() and not _handled.wait(GRACE_S):
                break
    else:
        return
    try:
        os.write(2, b"interrupted\n")
    finally:
        os._exit(128 + number)


@contextmanager
def deferring(request: Callable[[], float]) -> Iterator[None]:
    """Defer SIGTERM while the body runs, so that it can end in order; a second one ends the body at once.

    Args:
        request: called in a thread when the signal arrives; returns the seconds that the body may still take.

    Raises:
        Interrupted: a signal has arrived, and the body has ended or has been ended.
    """
    deferral = _Deferral(request)
    before = signal.getsignal(signal.SIGTERM)
    if before != signal.SIG_IGN:
        signal.signal(signal.SIGTERM, deferral.handle)
    try:
        with closing(deferral):
            yield
    except Interrupted:
        raise
    except BaseException as error:
        if deferral.began is None:
            raise
        # What the signal caused cannot be told from other failures, such as those of the user of a generator.
        failure = error.__context__ if isinstance(error, GeneratorExit) else error
        if failure is not None and not isinstance(failure, Interrupted):
            log.warning("the work in flight failed before it had ended: %s", failure)
        _interrupt(signal.SIGTERM, None)
    finally:
        if signal.getsignal(signal.SIGTERM) == deferral.handle:
            signal.signal(signal.SIGTERM, before)
    if deferral.began is not None:
        _interrupt(signal.SIGTERM, None)


class _Deferral:
    def __init__(self, request: Callable[[], float]) -> None:
        self.request, self.main = request, threading.get_ident()
        self.began: float | None = None
        self.over, self.due = threading.Event(), threading.Event()
        self.ending = threading.Lock()

    def close(self) -> None:
        """Note that the body has ended: from now on, no signal is sent."""
        with self.ending:
            self.over.set()
        _deferred.clear()

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handle SIGTERM in the main thread. A second one that arrives almost at once is taken for the first."""
        if self.began is None:
            self.began = time.monotonic()
            _deferred.set()
            _handled.set()
            threading.Thread(target=self._end_in_time, daemon=True).start()
        elif self.due.is_set() or time.monotonic() - self.began > GRACE_S:
            _interrupt(number, frame)

    def _end_in_time(self) -> None:
        self.over.wait(self._ask())
        with self.ending:
            if not self.over.is_set():
                self.due.set()
                _handled.clear()
                _deferred.clear()
                signal.pthread_kill(self.main, signal.SIGTERM)

    def _ask(self) -> float:
        """Return the seconds that the body may still take: none if the request fails, or is not answered."""
        answers = list[float]()

        def ask() -> None:
            try:
                answers.append(self.request())
            except Exception as error:  # noqa: BLE001  the signal takes effect all the same
                log.warning("the work in flight cannot end in order: %s", error)

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(PATIENCE_S)
        return answers[0] if answers else 0.0


def _interrupt(number: int, _frame: FrameType | None) -> NoReturn:
    _ended.set()
    _handled.set()
    for either in SIGNALS:
        signal.signal(either, signal.SIG_DFL)
    raise Interrupted(number)
