"""Tells the configured services of a run. One that fails is warned of; the run goes on."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from pipeline.cluster import extract_cause
from pipeline.config.sections import TrackingConfig
from pipeline.run.driver import Summary
from pipeline.storage.location import join_lines
from pipeline.tracking.experiments import MlflowTracker
from pipeline.tracking.lineage import OpenLineageTracker
from pipeline.tracking.tracked_run import Ending, RunState, TrackedRun, Tracker

log = logging.getLogger(__name__)

Told = TypeVar("Told", TrackedRun, Ending)


def open_trackers(tracking: TrackingConfig) -> list[Tracker]:
    """Open the services of a configuration, without a request to them.

    Raises:
        ValueError: a package is missing, or its own configuration is wrong.
    """
    makers = ((OpenLineageTracker, tracking.openlineage), (MlflowTracker, tracking.mlflow))
    opened: list[Tracker] = []
    for maker, name in makers:
        if name is None:
            continue
        try:
            opened.append(maker(name))
        except ValueError:
            raise
        except Exception as error:
            raise ValueError(f"tracking: {maker.name}: {join_lines(error)}") from error
    return opened


@dataclass
class Tracking:
    """A run as its trackers see it.

    Attributes:
        trackers: the services.
        run: the run.
        ending: its end, once the run says how it ended.
        begun: names of the services that know that it has begun.
    """

    trackers: Sequence[Tracker]
    run: TrackedRun
    ending: Ending | None = None
    begun: set[str] = field(default_factory=set)

    def note(self, summary: Summary) -> None:
        """Note how the run ended."""
        self.ending = Ending.of(summary)

    def begin(self) -> None:
        """Tell all services that the run begins; those that cannot be told are told at its end."""
        for tracker in self.trackers:
            self._begin(tracker)

    def _begin(self, tracker: Tracker) -> None:
        if tracker.name not in self.begun and _attempt(tracker, tracker.begin, self.run):
            self.begun.add(tracker.name)

    def end(self, ending: Ending) -> None:
        """Tell all services that the run has ended."""
        for tracker in self.trackers:
            self._begin(tracker)
            if tracker.name in self.begun:
                _attempt(tracker, tracker.end, ending)


def _attempt(tracker: Tracker, tell: Callable[[Told], None], what: Told) -> bool:
    """Tell a service, and return whether it was told; log a warning if not."""
    try:
        tell(what)
    except Exception as error:  # noqa: BLE001  whatever its client raises; no service ends a run
        log.warning("%s does not record this run: %s: %s", tracker.name, type(error).__name__, join_lines(error))
        return False
    return True


@contextmanager
def tracking(trackers: Sequence[Tracker], run: TrackedRun) -> Iterator[Tracking]:
    """Tell services that a run begins, and how it ended: as the body has noted, or failed, or interrupted."""
    tracked = Tracking(trackers, run)
    tracked.begin()
    try:
        yield tracked
    except Exception as error:
        tracked.end(Ending(RunState.FAIL, join_lines(extract_cause(error))))
        raise
    except BaseException:
        tracked.end(Ending(RunState.ABORT, "interrupted"))
        raise
    tracked.end(tracked.ending or Ending(RunState.COMPLETE))
