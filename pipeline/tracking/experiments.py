"""Records runs in MLflow: settings and digests as parameters, figures as metrics.

MLflow's own configuration names the server: ``MLFLOW_TRACKING_URI`` and, where it needs one, a login
(https://mlflow.org/docs/latest/ml/tracking/).
"""

import os
import re
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from typing import Any

from pipeline.config.loading import flatten
from pipeline.output.folder import hash_identity
from pipeline.run.driver import Summary
from pipeline.tracking.tracked_run import Ending, RunState, TrackedRun

STATES = {RunState.COMPLETE: "FINISHED", RunState.FAIL: "FAILED", RunState.ABORT: "KILLED"}
# Limits of MLflow's REST API: parameters in one call, and characters of a key, and of a value in all of its stores.
MOST_PARAMETERS = 100
KEY_CHARACTERS, VALUE_CHARACTERS = 250, 500
_REFUSED = re.compile(r"[^\w\-. ]")
# Fields of ``Summary`` that are not figures.
TEXTS = ("output", "budget", "error_types", "max_error_rate")


class MlflowTracker:
    """Records a run in an experiment.

    Args:
        experiment: name of the experiment, which is created if there is none.

    Raises:
        ValueError: the package mlflow is missing, or no server is configured.
    """

    name = "MLflow"

    def __init__(self, experiment: str) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        try:
            from mlflow import entities
            from mlflow.tracking import MlflowClient
        except ImportError:
            raise ValueError(
                "tracking.mlflow needs the package mlflow-skinny: pip install 'selfrag-batch[mlflow]'"
            ) from None
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            raise ValueError("tracking.mlflow: MLFLOW_TRACKING_URI is not set, so there is no server")
        self._client, self._entities, self._experiment = MlflowClient(), entities, experiment
        self._id = ""

    def begin(self, run: TrackedRun) -> None:
        """See :meth:`Tracker.begin`."""
        self._id = self._id or self._create(run)  # what follows may have failed before
        parameters = [self._entities.Param(name, text) for name, text in list_tracked_parameters(run.manifest).items()]
        for first in range(0, len(parameters), MOST_PARAMETERS):
            self._client.log_batch(self._id, params=parameters[first : first + MOST_PARAMETERS])

    def _create(self, run: TrackedRun) -> str:
        found = self._client.get_experiment_by_name(self._experiment)
        experiment = found.experiment_id if found else self._client.create_experiment(self._experiment)
        name = run.output.uri.rstrip("/").rpartition("/")[2]
        tags = {"selfrag.output": run.output.uri, "selfrag.run": run.output.digest or ""}
        created = self._client.create_run(experiment, _count_ms(run.started), tags, run_name=name)
        return str(created.info.run_id)

    def end(self, ending: Ending) -> None:
        """See :meth:`Tracker.end`."""
        if not self._id:  # the service has refused the run
            return
        time = _count_ms(ending.ended)
        figures = compute_figures(ending.summary) if ending.summary else {}
        metrics = [self._entities.Metric(name, value, time, 0) for name, value in figures.items()]
        tags = [self._entities.RunTag("selfrag.message", ending.message)] if ending.message else []
        try:
            self._client.log_batch(self._id, metrics=metrics, tags=tags)
        finally:
            self._client.set_terminated(self._id, STATES[ending.state], time)


def _count_ms(time: datetime) -> int:
    return round(1000 * time.timestamp())


def list_tracked_parameters(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return what decides the results of a run, and its configuration, as texts by dotted key; empty values left out.

    Long texts are cut: the manifest holds all of them.
    """
    parts = {name: manifest.get(name) for name in ("queries", "model", "index", "reranker", "stale", "versions")}
    kept = {name: part for name, part in parts.items() if part}
    named = flatten({"configuration": manifest["configuration"], **kept, "run": hash_identity(manifest)})
    texts = {name: str(value) for name, value in named.items() if value not in (None, "", {}, [])}
    return {_make_key(name): text[:VALUE_CHARACTERS] for name, text in texts.items()}


def _make_key(name: str) -> str:
    return _REFUSED.sub("_", name)[:KEY_CHARACTERS]


def compute_figures(summary: Summary) -> dict[str, float]:
    """Return the figures of a run by name: counts, and rates of its rows."""
    figures = {name: float(value) for name, value in asdict(summary).items() if name not in TEXTS}
    figures |= {_make_key(f"errors.{kind}"): float(count) for kind, count in summary.error_types.items()}
    answered = summary.rows - summary.errors - summary.left
    if summary.seconds:
        figures["rows_per_second"] = summary.annotated / summary.seconds
    if answered:
        figures["retrieved_share"] = summary.retrieved / answered
    return figures | {"error_share": summary.errors / summary.rows}
