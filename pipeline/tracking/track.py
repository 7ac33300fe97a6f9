"""Tells the configured services of a run. One that fails, or does not answer, is warned of; the run goes on."""

import logging
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeVar

from pipeline.cluster import extract_cause
from pipeline.config.sections import TrackingConfig
from pipeline.run.driver import Summary
from pipeline.run.plan import RunPlan
from pipeline.storage.location import join_lines
from pipeline.tracking.experiments import MlflowTracker
from pipeline.tracking.lineage import OpenLineageTracker
from pipeline.tracking.tracked_run import Ending, RunState, TrackedRun, Tracker

log = logging.getLogger(__name__)

# Seconds that a service has to answer, at the start of a run and at its end. Its client may wait for much longer.
PATIENCE_S = 10.0
_LOGIN = re.compile(r"(?<=://)[^/\s]+@")

Told = TypeVar("Told", TrackedRun, Ending)


def open_trackers(tracking: TrackingConfig) -> list[Tracker]:
    """Open the services of a configuration, without a request to them.

    Raises:
        ValueError: a package is missing, or its own configuration is wrong.
    """
    makers: dict[str, Callable[[str], Tracker]] = {"openlineage": OpenLineageTracker, "mlflow": MlflowTracker}
    opened: list[Tracker] = []
    for key, name in tracking:
        if name is None:
            continue
        try:
            opened.append(makers[key](name))
        except Exception as error:
            problem = _describe(error)
            raise ValueError(problem if problem.startswith("tracking.") else f"tracking.{key}: {problem}") from error
    return opened


class Reply(Enum):
    """The reply of a service: it was told, has refused, or has not answered yet."""

    TOLD = "told"
    REFUSED = "refused"
    WAITING = "waiting"


class Telling:
    """A call of a service in a thread of its own, since its client may wait for longer than a run can.

    Args:
        tracker: the service.
        tell: its method.
        what: what it is told.
    """

    def __init__(self, tracker: Tracker, tell: Callable[[Told], None], what: Told) -> None:
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(tell, what), name="tracking", daemon=True)
        self._thread.start()
        if self.wait() is Reply.WAITING:
            log.warning("%s has not answered within %g s; the run goes on", tracker.name, PATIENCE_S)
        elif self._error is not None:
            log.warning("%s does not record this run: %s", tracker.name, _describe(self._error))

    def _run(self, tell: Callable[[Told], None], what: Told) -> None:
        try:
            tell(what)
        except Exception as error:  # noqa: BLE001  whatever its client raises; no service ends a run
            self._error = error

    def wait(self) -> Reply:
        """Wait for the end of the call, for ``PATIENCE_S`` at most."""
        self._thread.join(PATIENCE_S)
        if self._thread.is_alive():
            return Reply.WAITING
        return Reply.TOLD if self._error is None else Reply.REFUSED


@dataclass
class Tracking:
    """A run as its trackers see it.

    Attributes:
        trackers: the services.
        run: the run, once it has begun.
        ending: its end, once the run says how it ended.
        begun: calls by which the services were told that it begins, by name.
    """

    trackers: Sequence[Tracker]
    run: TrackedRun | None = None
    ending: Ending | None = None
    begun: dict[str, Telling] = field(default_factory=dict)

    def begin(self, plan: RunPlan) -> None:
        """Tell all services that the run begins."""
        self.run = TrackedRun.of(plan)
        for tracker in self.trackers:
            self.begun[tracker.name] = Telling(tracker, tracker.begin, self.run)

    def note(self, summary: Summary) -> None:
        """Note how the run ended."""
        self.ending = Ending.of(summary)

    def end(self, ending: Ending) -> None:
        """Tell all services that the run has ended, if it had begun.

        A service that has refused the beginning is told again; one that has not answered yet is not told of the end.
        """
        if self.run is None:
            return
        for tracker in self.trackers:
            reply = self.begun[tracker.name].wait() if tracker.name in self.begun else Reply.REFUSED
            if reply is Reply.REFUSED:
                reply = Telling(tracker, tracker.begin, self.run).wait()
            if reply is not Reply.WAITING:
                Telling(tracker, tracker.end, ending)


def _describe(error: Exception) -> str:
    """Describe an error in one line, without a login in the URL of a service."""
    return _LOGIN.sub("…@", join_lines(error)) or type(error).__name__


@contextmanager
def tracking(trackers: Sequence[Tracker]) -> Iterator[Tracking]:
    """Tell services of the run in the body: that it begins, once it does, and how it ended."""
    tracked = Tracking(list(trackers))
    try:
        yield tracked
    except Exception as error:
        tracked.end(Ending(RunState.FAIL, join_lines(extract_cause(error))))
        raise
    except BaseException:
        tracked.end(Ending(RunState.ABORT, "interrupted"))
        raise
    if tracked.ending is not None:
        tracked.end(tracked.ending)
