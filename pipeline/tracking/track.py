"""Tells the configured services of a run. One that fails, or does not answer, is warned of; the run goes on."""

import logging
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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
_LOGIN = re.compile(r"(?<=://)[^/@\s]+@")

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


@dataclass
class Tracking:
    """A run as its trackers see it.

    Attributes:
        trackers: services that answer in time.
        run: the run, once it has begun.
        ending: its end, once the run says how it ended.
        begun: names of the services that know that it has begun.
    """

    trackers: list[Tracker]
    run: TrackedRun | None = None
    ending: Ending | None = None
    begun: set[str] = field(default_factory=set)

    def begin(self, plan: RunPlan) -> None:
        """Tell all services that the run begins; those that cannot be told are told at its end."""
        self.run = TrackedRun.of(plan)
        self._tell_beginning(self.run)

    def note(self, summary: Summary) -> None:
        """Note how the run ended."""
        self.ending = Ending.of(summary)

    def end(self, ending: Ending) -> None:
        """Tell all services that the run has ended, if it had begun."""
        if self.run is None:
            return
        self._tell_beginning(self.run)
        for tracker in list(self.trackers):
            if tracker.name in self.begun:
                self._tell(tracker, tracker.end, ending)

    def _tell_beginning(self, run: TrackedRun) -> None:
        for tracker in list(self.trackers):
            if tracker.name not in self.begun and self._tell(tracker, tracker.begin, run):
                self.begun.add(tracker.name)

    def _tell(self, tracker: Tracker, tell: Callable[[Told], None], what: Told) -> bool:
        """Tell a service, and return whether it was told; if not, log a warning. One that hangs is told no more."""
        errors = list[Exception]()

        def attempt() -> None:
            try:
                tell(what)
            except Exception as error:  # noqa: BLE001  whatever its client raises; no service ends a run
                errors.append(error)

        thread = threading.Thread(target=attempt, name=f"tracking {tracker.name}", daemon=True)
        thread.start()
        thread.join(PATIENCE_S)
        if thread.is_alive():
            log.warning("%s does not record this run: no answer within %g s", tracker.name, PATIENCE_S)
            self.trackers.remove(tracker)
            return False
        if errors:
            log.warning("%s does not record this run: %s", tracker.name, _describe(errors[0]))
        return not errors


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
    tracked.end(tracked.ending or Ending(RunState.COMPLETE))
