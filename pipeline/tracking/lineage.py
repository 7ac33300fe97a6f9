"""Sends OpenLineage events of a run: https://openlineage.io/docs/spec/run-cycle.

The client's own configuration says where they go (``OPENLINEAGE_URL``, or the file ``openlineage.yml``), and
``OPENLINEAGE_NAMESPACE`` names the namespace of the job.
"""

import logging
import os
from typing import Any

import pyarrow as pa

from pipeline.tracking.tracked_run import Ending, RunState, TrackedData, TrackedRun

log = logging.getLogger(__name__)

# Seconds in which events that are sent in the background must have left.
CLOSING_S = 5.0


class OpenLineageTracker:
    """Sends an event when a run begins, and one when it ends.

    Args:
        job: name of the job.

    Raises:
        ValueError: the package openlineage-python is missing.
    """

    name = "OpenLineage"

    def __init__(self, job: str) -> None:
        try:
            from openlineage.client import OpenLineageClient, event_v2, facet_v2
            from openlineage.client.uuid import generate_new_uuid
        except ImportError:
            raise ValueError(
                "tracking.openlineage needs the package openlineage-python: pip install 'selfrag-batch[openlineage]'"
            ) from None
        self._client, self._events, self._facets = OpenLineageClient(), event_v2, facet_v2
        if self._client.transport.kind == "console":
            log.warning("OpenLineage events only go to the log: OPENLINEAGE_URL or openlineage.yml names no server")
        self._id = str(generate_new_uuid())
        self._run: TrackedRun
        kind = facet_v2.job_type_job.JobTypeJobFacet("BATCH", "SELFRAG_BATCH", "JOB")
        space = os.environ.get("OPENLINEAGE_NAMESPACE", "default")
        self._job = event_v2.Job(space, job, {"jobType": kind})

    def begin(self, run: TrackedRun) -> None:
        """See :meth:`Tracker.begin`."""
        self._run = run
        self._emit("START", run.started.isoformat(), {}, {})

    def end(self, ending: Ending) -> None:
        """See :meth:`Tracker.end`."""
        facets, outcome, modules = {}, {}, self._facets
        if ending.message:
            facets["errorMessage"] = modules.error_message_run.ErrorMessageRunFacet(ending.message, "Python")
        if ending.summary and ending.state is RunState.COMPLETE:
            answered = ending.summary.rows - ending.summary.errors
            statistics = modules.output_statistics_output_dataset.OutputStatisticsOutputDatasetFacet(rowCount=answered)
            outcome["outputStatistics"] = statistics
        self._emit(ending.state.upper(), ending.ended.isoformat(), facets, outcome)
        self._client.close(CLOSING_S)  # some transports send in the background

    def _emit(self, state: str, time: str, facets: dict[str, Any], outcome: dict[str, Any]) -> None:
        run, events = self._run, self._events
        versions = run.manifest["versions"]
        producer = f"urn:selfrag-batch:{versions.get('selfrag-batch', 'unknown')}"
        engine = self._facets.processing_engine_run.ProcessingEngineRunFacet(versions["ray"], "Ray")
        event = events.RunEvent(
            eventTime=time,
            eventType=events.RunState[state],
            producer=producer,
            run=events.Run(self._id, {"processing_engine": engine, **facets}),
            job=self._job,
            inputs=[events.InputDataset(*name_dataset(one.uri), facets=self._describe(one)) for one in run.inputs],
            outputs=[
                events.OutputDataset(
                    *name_dataset(run.output.uri), facets=self._describe(run.output), outputFacets=outcome
                )
            ],
        )
        self._client.emit(event)

    def _describe(self, data: TrackedData) -> dict[str, Any]:
        """Return the facets of a dataset: its version and its schema, if it has them."""
        facets: dict[str, Any] = {}
        if data.digest is not None:
            facets["version"] = self._facets.dataset_version_dataset.DatasetVersionDatasetFacet(data.digest)
        if data.schema is not None:
            facets["schema"] = self._facets.schema_dataset.SchemaDatasetFacet(
                [self._describe_field(field.name, field.type) for field in data.schema]
            )
        return facets

    def _describe_field(self, name: str, kind: Any) -> Any:
        """Describe a column; elements of lists and maps have the names of the specification."""
        nested: list[tuple[str, Any]] = []
        text = str(kind)
        if pa.types.is_struct(kind):
            text, nested = "struct", [(field.name, field.type) for field in kind]
        elif pa.types.is_map(kind):
            text, nested = "map", [("_key", kind.key_type), ("_value", kind.item_type)]
        elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
            text, nested = "array", [("_element", kind.value_type)]
        fields = [self._describe_field(*field) for field in nested]
        return self._facets.schema_dataset.SchemaDatasetFacetFields(name, text, fields=fields)


def name_dataset(uri: str) -> tuple[str, str]:
    """Return the namespace and the name of a dataset: https://openlineage.io/docs/spec/naming."""
    scheme, _, rest = uri.rpartition("://")
    if scheme in ("", "file"):
        return "file", rest.rstrip("/")
    bucket, _, path = rest.partition("/")
    return f"{scheme}://{bucket}", path.strip("/") or "/"
