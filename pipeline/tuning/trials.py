"""Runs the trials of a tuning: each is a run of its own over the same sample, with one actor and a fresh engine.

A trial's annotated set is beside the others, so that its answers can be looked at. A tuning that is continued takes the
figures of finished trials from ``tuning.json``, and begins an interrupted one again.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ray.exceptions import RayError

from pipeline.cluster import Resources, check_sharing, extract_cause
from pipeline.config.loading import find_differing
from pipeline.config.run import RunConfig, make_paths_absolute
from pipeline.config.sections import (
    NO_SAMPLE,
    ExecutionConfig,
    OnFailure,
    PublishConfig,
    SampleConfig,
    TrackingConfig,
)
from pipeline.nodes.access import NodeAccessError
from pipeline.output.compacted import read_run_units
from pipeline.output.folder import OutputFolder
from pipeline.queries.selection import Selection
from pipeline.run.driver import allot_resources, run_plan
from pipeline.run.forecast import measure_pace
from pipeline.run.plan import RunPlan, check_run
from pipeline.storage.lease import LeaseLostError, OutputInUseError
from pipeline.storage.location import Location, StorageError, join_lines
from pipeline.tuning.comparison import ScoredAnswer, compare_scored_answers, read_scored_answers
from pipeline.tuning.search import EngineTrial
from pipeline.tuning.trial_actor import PLAINLY_SLOWER, make_trial_actor
from pipeline.tuning.tuning_log import TuningLog, describe_basis

log = logging.getLogger(__name__)

# Settings of ``execution`` that trials do not have in common with the run.
APART = ("actors", "price_per_hour", "max_hours", "max_cost", "max_error_rate", "lock")


class IncomparableError(Exception):
    """Trials can no longer be compared with the first one."""


@dataclass
class Trials:
    """The trials of a tuning in a folder.

    Attributes:
        config: configuration of the first trial, which draws the sample; the others read it.
        most_errors: share of the rows that may fail.
        folder: folder of all trials.
        resources: resources of an actor.
        plan: plan of the first trial.
        found: list of the trials in the folder, which this call goes on with; None if there is none.
        overwrite: whether trials in the folder are replaced.
        log: finished trials of earlier calls, and of this one.
        asked: outcomes of the trials that this call has asked for.
        answers: answered rows of the first trial, read on first use.
    """

    config: RunConfig
    most_errors: float
    folder: Location
    resources: Resources
    plan: RunPlan
    found: TuningLog | None
    overwrite: bool
    log: TuningLog
    asked: list[EngineTrial] = field(default_factory=list)
    answers: dict[str, ScoredAnswer] = field(default_factory=dict)

    @classmethod
    def prepare(cls, config: RunConfig, folder: Location, sample: SampleConfig, overwrite: bool) -> "Trials":
        """Check the run and the folder, and compute the resources of an actor; writes nothing.

        Args:
            config: configuration of the run.
            folder: folder of the trials.
            sample: sample of the run's rows.
            overwrite: whether trials in the folder are replaced.

        Raises:
            ValueError: bad input or configuration, or the folder holds an annotated set or the trials of another run.
            StorageError: a URI cannot be read.
            RuntimeError: the embedded model is not available.
        """
        config = make_paths_absolute(config)
        known = _read_trials(folder, overwrite)
        begun = known is not None and bool(known.trials)
        first = isolate(config, locate_trial(folder, 1), sample)
        plan = check_run(first, overwrite=not begun)
        resources = allot_resources(replace(plan, config=config))
        basis = describe_basis(config, resources, plan.digest)
        if known and begun and (differing := find_differing(known.basis, basis)):
            raise ValueError(
                f"--output {folder.uri} holds trials of a run that differs in {', '.join(differing)}; choose another "
                "output, or replace them with --overwrite"
            )
        log = known if known and begun else TuningLog(basis=basis)
        return cls(first, config.execution.max_error_rate, folder, resources, plan, known, overwrite, log)

    def begin(self) -> None:
        """Delete the trials that this call replaces, before the first one; call it under a lease on the folder.

        Raises:
            OutputInUseError: another call has used the folder since this one was prepared.
            StorageError: the folder cannot be written.
        """
        if not self.overwrite and TuningLog.read(self.folder) != self.found:
            raise OutputInUseError(f"{self.folder.uri}: another call has changed the trials; repeat the command")
        if self.log.trials:
            return
        self.log.write(self.folder)
        for place in _list_trials(self.folder):
            OutputFolder(place).clear()

    def measure(self, settings: Mapping[str, Any], limit: float | None) -> EngineTrial:
        """Run a trial, unless an earlier call has; see ``search.Measure``.

        Raises:
            IncomparableError: the index or a model has changed, or the answers of the first trial are gone.
            OutputInUseError: another run is using the folder of the trial.
            StorageError: the storage cannot be read or written.
        """
        repetition = sum(trial.settings == settings for trial in self.asked)
        trial = self.log.find(settings, limit, repetition) or self._run_next(settings, limit)
        self.asked.append(trial)
        return trial

    def _run_next(self, settings: Mapping[str, Any], limit: float | None) -> EngineTrial:
        """Run a trial and add it to the finished ones."""
        number = len(self.log.trials) + 1
        log.info("trial %d: %s", number, format_settings(settings))
        trial = self._run(number, settings, limit).model_copy(update={"number": number, "settings": dict(settings)})
        log.info("trial %d: %s", number, describe_trial(trial))
        if number > 1 or not trial.problem:  # without the first one, there is no sample
            self.log = TuningLog(basis=self.log.basis, trials=(*self.log.trials, trial))
            self.log.write(self.folder)
        return trial

    def _run(self, number: int, settings: Mapping[str, Any], limit: float | None) -> EngineTrial:
        config = self._configure(number, settings)
        try:
            check_sharing(config, self.resources.gpus)
            plan = check_run(config, overwrite=True)
            self._check_models(plan)
            summary = run_plan(plan, self.resources, make_trial_actor(limit))
        except (OutputInUseError, LeaseLostError, NodeAccessError, StorageError):
            raise
        except (RuntimeError, ValueError, RayError) as error:  # of this engine; the next trial has a fresh one
            problem = join_lines(extract_cause(error)) or type(error).__name__
            return EngineTrial(problem=problem, stopped_after=limit if problem.startswith(PLAINLY_SLOWER) else None)
        if summary.errors == summary.rows or summary.errors > self.most_errors * summary.rows:
            kinds = ", ".join(summary.error_types)
            return EngineTrial(problem=f"{summary.errors} of {summary.rows} rows failed ({kinds})")
        return self._compare(plan.output)

    def _check_models(self, plan: RunPlan) -> None:
        """Check that a trial reads the index and the models of the first one.

        Raises:
            IncomparableError: it does not.
        """
        first = self.plan
        if (plan.model, plan.index, plan.reranker) != (first.model, first.index, first.reranker):
            raise IncomparableError(
                "the index or a model has changed since the first trial; repeat the command with --overwrite"
            )

    def _configure(self, number: int, settings: Mapping[str, Any]) -> RunConfig:
        """Return the configuration of a trial: the first one draws the sample, which the others read."""
        config = self.config
        if number > 1:
            drawn = Selection.load(locate_trial(self.folder, 1), config.queries, config.sample)
            if drawn is None:
                raise IncomparableError(f"{self.folder.uri}: the sample is gone; repeat the command with --overwrite")
            execution = config.execution.model_copy(update={"unit_rows": drawn.unit_rows})
            sampled = {"queries": drawn.folder.uri, "sample": NO_SAMPLE, "execution": execution}
            config = config.model_copy(update=sampled)
        model = config.model.model_copy(update={"engine": {**config.model.engine, **settings}})
        return config.model_copy(update={"output": locate_trial(self.folder, number).uri, "model": model})

    def _compare(self, output: OutputFolder) -> EngineTrial:
        """Measure the rate of a finished trial and compare its answers with those of the first."""
        units = read_run_units(output.location).values()
        times = [unit.ended - unit.began for unit in units if unit.ended and unit.began]
        pace = measure_pace(units)
        if len({unit.actor for unit in units}) != 1 or pace is None:
            return EngineTrial(problem="its actor was replaced on the way, so that its speed is unknown")
        answers = read_scored_answers(output, self.config.columns.id)
        self.answers = self.answers or read_scored_answers(self.plan.output, self.config.columns.id)
        if not self.answers:
            first = self.plan.output.location.uri
            raise IncomparableError(f"{first}: the answers are gone; repeat the command with --overwrite")
        changed, shift = compare_scored_answers(self.answers, answers)
        return EngineTrial(rate=pace.low, changed=changed, shift=shift, longest=max(times))


def isolate(config: RunConfig, output: Location, sample: SampleConfig) -> RunConfig:
    """Return the configuration of a trial: one actor, and nothing that reaches beyond the output."""
    shared = {name: value for name, value in config.execution if name not in APART}
    apart = {
        "skip_annotated": None,
        "stale": None,
        "publish": PublishConfig(),
        "tracking": TrackingConfig(),
        "on_failure": OnFailure(),
        "execution": ExecutionConfig(max_error_rate=1.0, **shared),
    }
    return config.model_copy(update={**apart, "output": output.uri, "sample": sample})


def _read_trials(folder: Location, overwrite: bool) -> TuningLog | None:
    """Read the list of the trials in a folder; None if there is none, or they are replaced.

    Raises:
        ValueError: the folder, or one in it that would be a trial's, holds an annotated set of a run.
    """
    holders = [folder] if TuningLog.is_in(folder) else [folder, *_list_trials(folder)]
    for place in holders:
        if OutputFolder(place).read_manifest() is not None:
            raise ValueError(f"--output {place.uri} holds an annotated set; choose another folder for the trials")
    return None if overwrite else TuningLog.read(folder)


def _list_trials(folder: Location) -> list[Location]:
    return [place for place in folder.list_folders() if place.name.startswith("trial-")]


def locate_trial(folder: Location, number: int) -> Location:
    """Return the folder of a trial, of which the first is number 1."""
    return folder / f"trial-{number:02d}"


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
