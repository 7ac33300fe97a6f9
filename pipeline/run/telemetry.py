"""Exports metrics of a running job to Prometheus.

``ray.util.metrics`` exports them on the metrics port of each node, as ``ray_selfrag_…`` with the label ``run``, beside
Ray's own (https://docs.ray.io/en/latest/ray-observability/user-guides/add-app-metrics.html). Names follow
https://prometheus.io/docs/practices/naming/. Ray's histograms have no exact sums, so times that are added up are
counters. Ray drops a gauge that has not been set for some seconds, but keeps the counters of ended processes.
"""

import logging
import string
import threading
from collections import Counter as Tally
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc
from ray.util.metrics import Counter, Gauge, Histogram

from pipeline.decoding.types import REQUEST_SECONDS, ROW_SECONDS
from pipeline.storage.location import join_lines

log = logging.getLogger(__name__)

# Bucket bounds in seconds, from a short answer on a fast GPU to a long one on a slow machine.
ROW_BUCKETS = [0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0]
SEARCH_BUCKETS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0]
# Descriptions of the counters, by field of ``usage``.
COUNTED = {
    "prompt_tokens": "Prompt tokens, including cached ones.",
    "cached_tokens": "Prompt tokens found in the engine's prefix cache.",
    "generated_tokens": "Generated tokens.",
    "engine_requests": "Requests to the engine.",
    "retrievals": "Searches of the index.",
    "empty_searches": "Searches that found no passage.",
}
# Seconds between updates of the driver's gauges: a unit may take longer than Ray keeps a gauge that is not set.
REPEAT_SECONDS = 5.0
STAGES = [name.removesuffix("_seconds") for name in (*ROW_SECONDS, *REQUEST_SECONDS) if name != "seconds"]


class _Metric:
    """A metric of a run. The first failure is logged; none is raised, since metrics must never end a run.

    Args:
        run: URI of the output.
        update: name of the method of Ray's metric that takes a value.
        make: creates Ray's metric.
    """

    def __init__(self, run: str, update: str, make: Callable[[], Any]) -> None:
        self._warned = False
        self._update = self._attempt(lambda: getattr(make().set_default_tags({"run": encode_label(run)}), update))

    def record(self, value: float, **labels: str) -> None:
        """Add to a counter, set a gauge, or observe a value of a histogram."""
        if self._update is not None:
            self._attempt(lambda: self._update(value, {name: encode_label(text) for name, text in labels.items()}))

    def _attempt(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except Exception as error:  # noqa: BLE001  whatever Ray raises
            if not self._warned:
                log.warning("a metric is not exported: %s: %s", type(error).__name__, join_lines(error))
            self._warned = True
            return None


def encode_label(text: str) -> str:
    """Percent-encode characters outside ASCII, which Ray does not accept in labels."""
    return quote(text, safe=string.printable)


def _make_counter(run: str, name: str, text: str, *labels: str) -> _Metric:
    return _Metric(run, "inc", lambda: Counter(f"selfrag_{name}_total", text, ("run", *labels)))


def _make_gauge(run: str, name: str, text: str) -> _Metric:
    return _Metric(run, "set", lambda: Gauge(f"selfrag_{name}", text, ("run",)))


def _make_histogram(run: str, name: str, text: str, buckets: list[float]) -> _Metric:
    return _Metric(run, "observe", lambda: Histogram(f"selfrag_{name}", text, buckets, ("run",)))


def _add(counter: _Metric, value: float | None, **labels: str) -> None:
    if value:  # Ray's counters reject 0
        counter.record(value, **labels)


class ActorTelemetry:
    """Metrics of one actor; rows and tokens are counted at the end of their unit.

    Args:
        run: URI of the output.
    """

    def __init__(self, run: str) -> None:
        self._rows = _make_counter(run, "rows", "Rows that were answered or failed.")
        self._errors = _make_counter(run, "row_errors", "Rows that failed.", "type")
        self._retrieved = _make_counter(run, "retrieved_rows", "Rows answered with a passage.")
        self._counted = {name: _make_counter(run, name, text) for name, text in COUNTED.items()}
        self._stages = _make_counter(run, "stage_seconds", "Seconds that rows spent in a stage.", "stage")
        self._seconds = _make_histogram(run, "row_seconds", "Seconds from a row's first step to its last.", ROW_BUCKETS)
        self._in_flight = _make_gauge(run, "rows_in_flight", "Rows of the units that an actor is decoding.")
        self._running = _make_gauge(run, "engine_running_requests", "Requests in the engine after its last step.")
        self._waiting = _make_gauge(
            run, "engine_waiting_requests", "Requests waiting for a slot in the engine after its last step."
        )
        self._searches = _make_histogram(
            run, "search_seconds", "Seconds of a search with a batch of queries.", SEARCH_BUCKETS
        )
        self._flying = 0
        self._warned = False

    @contextmanager
    def counting_rows(self, rows: int) -> Iterator[None]:
        """Count the rows of a unit as in flight while the body runs."""
        self._flying += rows
        try:
            yield
        finally:
            self._flying -= rows

    def count_unit(self, annotated: pa.Table) -> None:
        """Count the rows of a finished unit, a table of ``annotation.build_annotated_schema``; never raises."""
        try:
            self._count_rows(annotated)
        except Exception as error:  # noqa: BLE001  the unit is written; a metric must not fail it
            if not self._warned:
                log.warning("units are not counted in all metrics: %s: %s", type(error).__name__, join_lines(error))
            self._warned = True

    def _count_rows(self, annotated: pa.Table) -> None:
        _add(self._rows, annotated.num_rows)
        _add(self._retrieved, pc.sum(annotated["retrieved"]).as_py())
        for kind, count in Tally(annotated["error_type"].drop_null().to_pylist()).items():
            _add(self._errors, count, type=kind)
        usage = annotated["usage"].combine_chunks()
        for name, counter in self._counted.items():
            _add(counter, pc.sum(pc.struct_field(usage, name)).as_py())
        for stage in STAGES:
            _add(self._stages, pc.sum(pc.struct_field(usage, f"{stage}_seconds")).as_py(), stage=stage)
        for seconds in pc.struct_field(usage, "seconds").drop_null().to_pylist():
            self._seconds.record(seconds)

    def record_step(self, running: int, waiting: int, _: int) -> None:
        """Set the gauges after a step of the engine; see ``EngineLoad.on_step``."""
        self._in_flight.record(self._flying)
        self._running.record(running)
        self._waiting.record(waiting)

    def record_search(self, seconds: float) -> None:
        """Record the latency in seconds of one batch of queries."""
        self._searches.record(seconds)


class RunTelemetry:
    """Metrics of the driver, exported while the context is open.

    Args:
        run: URI of the output.
        rows: number of rows that this call has to annotate.
    """

    def __init__(self, run: str, rows: int) -> None:
        self._rows = rows
        self._written = 0
        self._planned_gauge = _make_gauge(run, "run_rows", "Rows that this call has to annotate.")
        self._written_gauge = _make_gauge(run, "run_rows_written", "Rows of this call whose files are written.")
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._repeat, name="telemetry", daemon=True)

    def __enter__(self) -> "RunTelemetry":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def add_written(self, rows: int) -> None:
        """Add rows whose files are written."""
        self._written += rows

    def _repeat(self) -> None:
        over = False
        while not over:
            over = self._over.is_set()
            self._planned_gauge.record(self._rows)
            self._written_gauge.record(self._written)
            self._over.wait(REPEAT_SECONDS)


class DeathTelemetry:
    """Counters of actor starts and engine deaths, kept in a process that outlives both.

    Args:
        run: URI of the output.
    """

    def __init__(self, run: str) -> None:
        self._starts = _make_counter(run, "actor_starts", "Starts of an actor with its engine.")
        self._deaths = _make_counter(run, "engine_deaths", "Engines that died.", "out_of_memory")

    def count_start(self) -> None:
        """Count an actor that starts."""
        self._starts.record(1)

    def count_death(self, out_of_memory: bool) -> None:
        """Count an engine that died."""
        self._deaths.record(1, out_of_memory=str(out_of_memory).lower())
