"""Describes a run to a service: before it begins, and at its end."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Protocol

import pyarrow as pa

from pipeline.output.schema import build_data_schema
from pipeline.run.driver import Summary, record_plan
from pipeline.run.plan import RunPlan


@dataclass(frozen=True)
class TrackedData:
    """A set of data that a run reads or writes.

    Attributes:
        uri: URI or absolute path of the file or folder.
        digest: digest of its content, or of everything that decides it; None if only a part of it is meant.
        schema: schema of its rows; None if it has none.
    """

    uri: str
    digest: str | None
    schema: pa.Schema | None = None


@dataclass(frozen=True)
class TrackedRun:
    """A run that begins; each call of a command is one.

    Attributes:
        inputs: query set, index, and earlier set whose answers are carried over.
        output: annotated set.
        manifest: what the manifest says of the run before it begins.
        started: time when it begins.
    """

    inputs: tuple[TrackedData, ...]
    output: TrackedData
    manifest: Mapping[str, Any]
    started: datetime = field(default_factory=lambda: datetime.now(UTC))

    @classmethod
    def of(cls, plan: RunPlan) -> "TrackedRun":
        """Describe a planned run."""
        whole = plan.population is None and not plan.known
        inputs = [TrackedData(plan.config.queries, plan.queries.digest if whole else None, plan.queries.schema)]
        if plan.index is not None and plan.config.index is not None:
            inputs.append(TrackedData(plan.config.index, plan.index["digest"]))
        if plan.stale is not None and plan.config.stale is not None:
            inputs.append(TrackedData(plan.config.stale, plan.stale["run"]))
        rows = build_data_schema(plan.queries.schema, plan.config.decoding.keep_candidates)
        return cls(tuple(inputs), TrackedData(plan.config.output, plan.digest, rows), record_plan(plan))


class RunState(StrEnum):
    """End states of a run: all rows done, failed, or ended early, with rows left."""

    COMPLETE = "complete"
    FAIL = "fail"
    ABORT = "abort"


@dataclass(frozen=True)
class Ending:
    """The end of a run.

    Attributes:
        state: how it ended.
        message: why it failed or ended early, in one line; empty if it is complete.
        summary: its figures; None if it has none.
        ended: time when it ended.
    """

    state: RunState
    message: str = ""
    summary: Summary | None = None
    ended: datetime = field(default_factory=lambda: datetime.now(UTC))

    @classmethod
    def of(cls, summary: Summary) -> "Ending":
        """Describe the end of a run that has figures."""
        if summary.left:
            return cls(RunState.ABORT, f"{summary.budget} is spent: {summary.left} rows are left", summary)
        if summary.exit_status == 1:
            return cls(RunState.FAIL, f"{summary.errors} of {summary.rows} rows failed", summary)
        return cls(RunState.COMPLETE, "", summary)


class Tracker(Protocol):
    """A service in which a run is recorded. Both methods may raise anything; no run ends by it."""

    name: str

    def begin(self, run: TrackedRun) -> None:
        """Record that a run begins."""

    def end(self, ending: Ending) -> None:
        """Record the end of the run that has begun."""
