"""Runs the trials of a tuning: each is a run of its own over the same sample, with one actor and a fresh engine.

A trial's annotated set is beside the others, so that its answers can be looked at. Finished trials are listed in
``tuning.json``; a tuning that is continued takes their figures from there, and begins an interrupted trial again.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import ValidationError
from ray.exceptions import RayError

from pipeline.cluster import Resources, extract_cause
from pipeline.config.loading import Frozen, flatten
from pipeline.config.run import RunConfig, make_paths_absolute
from pipeline.config.sections import NO_SAMPLE, ExecutionConfig, OnFailure, PublishConfig, SampleConfig
from pipeline.nodes.access import NodeAccessError
from pipeline.output.compacted import read_run_units
from pipeline.output.folder import OutputFolder
from pipeline.queries.selection import Selection
from pipeline.run.annotation import TIMED_OUT
from pipeline.run.driver import Summary, allot_resources, run_plan
from pipeline.run.forecast import measure_pace
from pipeline.run.plan import RunPlan, check_run
from pipeline.storage.lease import LeaseLostError, OutputInUseError
from pipeline.storage.location import Location, StorageError, join_lines
from pipeline.tuning.comparison import ScoredAnswer, compare_scored_answers, read_scored_answers
from pipeline.tuning.search import EngineTrial
from pipeline.versions import read_versions

log = logging.getLogger(__name__)

# Settings of ``execution`` that trials do not have in common with the run: they end in time, and all of them end.
APART = ("actors", "price_per_hour", "max_hours", "max_cost", "max_error_rate", "lock")


class TuningLog(Frozen):
    """The content of ``tuning.json``: what trials must have in common to be compared, and the finished ones."""

    basis: dict[str, Any]
    trials: tuple[EngineTrial, ...] = ()


@dataclass
class Trials:
    """The trials of a tuning in a folder.

    Attributes:
        config: configuration of the first trial, which draws the sample; the others read it.
        most_errors: share of the rows that may fail.
        folder: folder of all trials.
        resources: resources of an actor.
        plan: plan of the first trial.
        log: finished trials of earlier calls, and of this one.
        count: number of trials that were asked for.
        answers: answered rows of the first trial, read on first use.
    """

    config: RunConfig
    most_errors: float
    folder: Location
    resources: Resources
    plan: RunPlan
    log: TuningLog
    count: int = 0
    answers: dict[str, ScoredAnswer] = field(default_factory=dict)

    @classmethod
    def prepare(cls, config: RunConfig, folder: Location, sample: SampleConfig, overwrite: bool) -> "Trials":
        """Check the run and the folder, and compute the resources of an actor.

        Args:
            config: configuration of the run.
            folder: folder of the trials.
            sample: sample of the run's rows.
            overwrite: whether trials in the folder are replaced.

        Raises:
            ValueError: bad input or configuration, or the folder holds the trials of another run.
            StorageError: a URI cannot be read.
            RuntimeError: the embedded model is not available.
        """
        config = make_paths_absolute(config)
        known = None if overwrite else read_log(folder)
        first = isolate(config, locate_trial(folder, 0), sample)
        plan = check_run(first, overwrite=known is None)
        resources = allot_resources(replace(plan, config=config))
        basis = describe_basis(config, resources)
        if known is not None and (differing := _find_differing(known.basis, basis)):
            raise ValueError(
                f"--output {folder.uri} holds trials of a run that differs in {', '.join(differing)}; choose another "
                "output, or replace them with --overwrite"
            )
        allowed = config.execution.max_error_rate
        return cls(first, allowed, folder, resources, plan, known or TuningLog(basis=basis))

    def measure(self, settings: Mapping[str, Any], limit: float | None) -> EngineTrial:
        """Run the next trial, unless an earlier call has; see ``search.Measure``.

        Raises:
            OutputInUseError: another run is using the folder of the trial.
            StorageError: the storage cannot be read or written.
        """
        number, self.count = self.count, self.count + 1
        if number < len(self.log.trials) and self.log.trials[number].settings == settings:
            return self.log.trials[number]
        trial = self._run(number, settings, limit)
        log.info("trial %d: %s", number + 1, describe_trial(trial))
        if not settings and trial.problem:  # the command fails, and is repeated once the cause is gone
            return trial
        self.log = TuningLog(basis=self.log.basis, trials=(*self.log.trials[:number], trial))
        _locate_log(self.folder).write(self.log.model_dump_json(indent=1).encode())
        return trial

    def _run(self, number: int, settings: Mapping[str, Any], limit: float | None) -> EngineTrial:
        log.info("trial %d: %s", number + 1, format_settings(settings))
        config = self._configure(number, settings, limit)
        try:
            plan = check_run(config, overwrite=True)
            summary = run_plan(plan, self.resources)
        except (OutputInUseError, LeaseLostError, NodeAccessError, StorageError):
            raise
        except (RuntimeError, ValueError, RayError) as error:  # of this engine; the next trial has a fresh one
            return EngineTrial(
                settings=dict(settings), problem=join_lines(extract_cause(error)) or type(error).__name__
            )
        seconds = None if limit is None else config.execution.row_timeout_s
        problem = self._find_problem(summary, seconds)
        return (
            EngineTrial(settings=dict(settings), problem=problem) if problem else self._compare(settings, plan.output)
        )

    def _configure(self, number: int, settings: Mapping[str, Any], limit: float | None) -> RunConfig:
        """Return the configuration of a trial: the first one draws the sample, which the others read."""
        config = self.config
        if number:
            drawn = Selection.load(locate_trial(self.folder, 0), config.queries, config.sample)
            if drawn is None:
                raise StorageError(f"{self.folder.uri}: the sample is missing; repeat the command with --overwrite")
            execution = config.execution.model_copy(update={"unit_rows": drawn.unit_rows})
            config = config.model_copy(
                update={"queries": drawn.folder.uri, "sample": NO_SAMPLE, "execution": execution}
            )
        seconds = config.execution.row_timeout_s
        execution = config.execution.model_copy(update={"row_timeout_s": min(limit or seconds, seconds)})
        model = config.model.model_copy(update={"engine": {**config.model.engine, **settings}})
        output = locate_trial(self.folder, number).uri
        return config.model_copy(update={"output": output, "execution": execution, "model": model})

    def _compare(self, settings: Mapping[str, Any], output: OutputFolder) -> EngineTrial:
        """Measure the rate of a finished trial and compare its answers with those of the first."""
        pace = measure_pace(read_run_units(output.location).values())
        answers = read_scored_answers(output, self.config.columns.id)
        self.answers = self.answers or read_scored_answers(self.plan.output, self.config.columns.id)
        changed, shift = compare_scored_answers(self.answers, answers)
        longest = max((row.seconds for row in answers.values()), default=0.0)
        rate = pace.low if pace else None
        problem = "" if rate else "no unit has times"
        return EngineTrial(
            settings=dict(settings), rate=rate, changed=changed, shift=shift, longest=longest, problem=problem
        )

    def _find_problem(self, summary: Summary, limit: float | None) -> str:
        """Return why a finished trial does not count; empty if it does."""
        if limit is not None and (late := summary.error_types.get(TIMED_OUT)):
            return f"plainly slower: {late} of {summary.rows} rows were not done after {limit:.0f} s"
        if summary.errors > self.most_errors * summary.rows:
            return f"{summary.errors} of {summary.rows} rows failed ({', '.join(summary.error_types)})"
        return ""


def isolate(config: RunConfig, output: Location, sample: SampleConfig) -> RunConfig:
    """Return the configuration of a trial: one actor, and nothing that reaches beyond the output."""
    shared = {name: value for name, value in config.execution if name not in APART}
    execution = ExecutionConfig(max_error_rate=1.0, **shared)
    alone = {"skip_annotated": None, "stale": None, "publish": PublishConfig(), "on_failure": OnFailure()}
    return config.model_copy(update={**alone, "output": output.uri, "sample": sample, "execution": execution})


def describe_basis(config: RunConfig, resources: Resources) -> dict[str, Any]:
    """Return what trials must have in common to be compared, beyond what a run that is resumed must have."""
    shared = {"cpus": resources.cpus, "gpus": resources.gpus, "units_in_flight": config.execution.units_in_flight}
    basis = flatten({"model": {"engine": config.model.engine}, "execution": shared, "versions": read_versions()})
    return {key: value for key, value in basis.items() if value != {}}


def _find_differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))


def read_log(folder: Location) -> TuningLog | None:
    """Return the finished trials in a folder; None if there are none.

    Raises:
        ValueError: the file is damaged; names it.
        StorageError: it cannot be read.
    """
    file = _locate_log(folder)
    if not file.exists():
        return None
    try:
        return TuningLog.model_validate_json(file.read())
    except ValidationError as error:
        raise ValueError(
            f"{file.uri}: {error.errors()[0]['msg'].lower()}; choose another output, or replace it with --overwrite"
        ) from None


def locate_trial(folder: Location, number: int) -> Location:
    """Return the folder of a trial; numbers begin with 0, names with 1."""
    return folder / f"trial-{number + 1:02d}"


def _locate_log(folder: Location) -> Location:
    return folder / "tuning.json"


def format_settings(settings: Mapping[str, Any]) -> str:
    """Format settings as in ``max_num_seqs=64, dtype=bfloat16``."""
    if not settings:
        return "as configured"
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in settings.items()}
    return ", ".join(f"{name}={text}" for name, text in texts.items())


def describe_trial(trial: EngineTrial) -> str:
    """Describe the outcome of a trial in a few words."""
    if trial.rate is None:
        return trial.problem
    return f"{trial.rate:.2f} queries/s, {trial.changed:.1%} of the answers changed"
