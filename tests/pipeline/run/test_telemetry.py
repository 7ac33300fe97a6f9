"""Scraped as Prometheus does it: from the metrics port of a Ray node."""

import re
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import ray
from ray.util.metrics import Counter, Gauge, Histogram

from pipeline.run.annotation import build_annotated_schema
from pipeline.run.telemetry import ActorTelemetry, DeathTelemetry, RunTelemetry, encode_label
from tests.faults.campaign import model_folder
from tests.faults.harness import Job, write_queries
from tests.faults.series import cluster

Sample = dict[tuple[str, str], float]
LINE = re.compile(r"^ray_(?P<name>selfrag_\w+)\{(?P<labels>.*)\} (?P<value>\S+)$", re.MULTILINE)
OWN = ("type", "stage", "out_of_memory", "run")
RUN = "out/one"


def scrape(port: int, run: str) -> Sample:
    """Values of a run by name and label (``type=…``; the last one of our own), added up over processes."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found: dict[tuple[str, str], float] = defaultdict(float)
    for match in LINE.finditer(text):
        labels = dict(re.findall(r'(\w+)="([^"]*)"', match["labels"]))
        if "le" not in labels and labels.get("run") == run:
            label = next((f"{name}={labels[name]}" for name in OWN if name in labels), "")
            found[match["name"], label] += float(match["value"])
    return dict(found)


def wait_for(port: int, run: str, holds: Callable[[Sample], bool], seconds: float = 240) -> Sample:
    """What is there as soon as something holds; Ray exports every few seconds."""
    until = time.monotonic() + seconds
    while not holds(found := scrape(port, run)) and time.monotonic() < until:
        time.sleep(0.5)
    return found


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """Address and metrics port of a cluster of one node."""
    with cluster(tmp_path_factory.mktemp("metrics")) as made:
        yield made.address, made.head_node.metrics_export_port


USAGE = {
    "prompt_tokens": 100,
    "cached_tokens": 60,
    "generated_tokens": 7,
    "engine_requests": 4,
    "retrievals": 1,
    "empty_searches": 1,
}
SECONDS = {
    "seconds": 3.0,
    "decide_seconds": 0.5,
    "retrieve_seconds": 0.25,
    "rerank_seconds": 0.75,
    "critique_seconds": 0.125,
    "decode_seconds": 2.0,
}


class Counting:
    """Counts two units, one row of three failed."""

    def __init__(self, run: str) -> None:
        self.actor, self.deaths = ActorTelemetry(run), DeathTelemetry(run)
        self.run = RunTelemetry(run, 10)

    def count(self) -> None:
        rows = [
            {"retrieved": True, "usage": {**USAGE, **SECONDS}},
            {"retrieved": False, "usage": {**USAGE, **SECONDS, "retrievals": 0}},
            {"error_type": "ValueError"},
        ]
        table = pa.Table.from_pylist(rows, schema=build_annotated_schema(pa.schema([("id", pa.string())]), False))
        self.actor.count_unit(table)
        self.actor.count_unit(table)
        with self.actor.counting_rows(4):
            self.actor.record_step(12, 3, 1)
        self.actor.record_search(0.02)
        self.actor.record_search(0.03)
        with self.run:
            self.run.add_written(3)
            self.run.add_written(3)
        self.deaths.count_start()
        self.deaths.count_start()
        self.deaths.count_death(out_of_memory=True)


EXPECTED = {
    ("selfrag_rows_total", "run=out/one"): 6,
    ("selfrag_row_errors_total", "type=ValueError"): 2,
    ("selfrag_retrieved_rows_total", "run=out/one"): 2,
    ("selfrag_prompt_tokens_total", "run=out/one"): 400,
    ("selfrag_cached_tokens_total", "run=out/one"): 240,
    ("selfrag_generated_tokens_total", "run=out/one"): 28,
    ("selfrag_engine_requests_total", "run=out/one"): 16,
    ("selfrag_retrievals_total", "run=out/one"): 2,
    ("selfrag_empty_searches_total", "run=out/one"): 4,
    ("selfrag_stage_seconds_total", "stage=decide"): 2.0,
    ("selfrag_stage_seconds_total", "stage=retrieve"): 1.0,
    ("selfrag_stage_seconds_total", "stage=rerank"): 3.0,
    ("selfrag_stage_seconds_total", "stage=critique"): 0.5,
    ("selfrag_stage_seconds_total", "stage=decode"): 8.0,
    ("selfrag_row_seconds_count", "run=out/one"): 4,
    ("selfrag_rows_in_flight", "run=out/one"): 4,
    ("selfrag_engine_running_requests", "run=out/one"): 12,
    ("selfrag_engine_waiting_requests", "run=out/one"): 3,
    ("selfrag_search_seconds_count", "run=out/one"): 2,
    ("selfrag_run_rows", "run=out/one"): 10,
    ("selfrag_run_rows_written", "run=out/one"): 6,
    ("selfrag_actor_starts_total", "run=out/one"): 2,
    ("selfrag_engine_deaths_total", "out_of_memory=true"): 1,
}


@pytest.mark.parametrize("method", ["inc", "set", "observe", "set_default_tags"])
def test_failing_metrics_are_logged_once_and_raise_nothing(
    method: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise UnicodeEncodeError("ascii", "ü", 0, 1, "ordinal not in range(128)")

    for kind in (Counter, Gauge, Histogram):
        monkeypatch.setattr(kind, method, fails, raising=False)
    counting = Counting("out/failing")  # a process that connects to Ray later exports what it counted before
    counting.count()
    warnings = [record.message for record in caplog.records if "a metric is not exported" in record.message]
    assert 0 < len(warnings) < 20
    assert all("UnicodeEncodeError: 'ascii' codec can't encode" in warning for warning in warnings)


def test_label_that_cannot_be_encoded_raises_nothing(caplog: pytest.LogCaptureFixture) -> None:
    DeathTelemetry("out/\udcff").count_start()
    assert "UnicodeEncodeError" in caplog.text


@pytest.mark.parametrize(
    ("label", "encoded"),
    [
        ("s3://bucket/größe 100%/{date}", "s3://bucket/gr%C3%B6%C3%9Fe 100%/{date}"),
        ("/data/año=2024", "/data/a%C3%B1o=2024"),
        ("東京", "%E6%9D%B1%E4%BA%AC"),
        ("القاهرة", "%D8%A7%D9%84%D9%82%D8%A7%D9%87%D8%B1%D8%A9"),
        ("out/😀", "out/%F0%9F%98%80"),
        ("cafe\u0301", "cafe%CC%81"),
        ("a\u00a0b", "a%C2%A0b"),
        ("a\u2028b", "a%E2%80%A8b"),
        ("plain", "plain"),
        ("", ""),
    ],
)
def test_labels_are_percent_encoded_where_they_are_not_ascii(label: str, encoded: str) -> None:
    assert encode_label(label) == encoded


def test_metrics_can_be_scraped(port: tuple[str, int]) -> None:
    ray.shutdown()  # other tests leave theirs up
    ray.init(address=port[0], log_to_driver=False, namespace="metrics")
    try:
        counting = ray.remote(num_cpus=0)(Counting).remote(RUN)
        ray.get(counting.count.remote())
        found = wait_for(port[1], RUN, lambda sample: EXPECTED.items() <= sample.items())
    finally:
        ray.shutdown()
    assert {key: value for key, value in found.items() if not key[0].endswith("_sum")} == EXPECTED


@pytest.mark.slow
def test_metrics_of_a_run_can_be_scraped(port: tuple[str, int], tmp_path: Path) -> None:
    """60 rows in six units; one raises, and one hangs until its time is over. The output's name is not ASCII."""
    write_queries(tmp_path / "queries", 60, {5: "RAISES", 55: "HANGS"})
    settings = [f"execution.ray_address={port[0]}", "execution.row_timeout_s=20", "execution.max_error_rate=0.5"]
    job = Job(str(tmp_path / "queries"), str(tmp_path / "größe-東京"), model_folder(tmp_path), settings)
    running = job.start()
    name = encode_label(f"{tmp_path}/größe-東京")
    run = f"run={name}"
    most = {("selfrag_rows_total", run): 50, ("selfrag_run_rows_written", run): 40}
    found = wait_for(port[1], name, lambda sample: all(sample.get(key, 0) >= count for key, count in most.items()))
    status, said = running.ended()
    assert status == 3, said[-3000:]
    assert found["selfrag_run_rows", run] == 60
    assert found["selfrag_rows_total", run] == 50
    assert found["selfrag_row_errors_total", "type=KeyError"] == 1
    assert found["selfrag_actor_starts_total", run] == 1
    assert found["selfrag_generated_tokens_total", run] > 0


def test_unit_that_cannot_be_counted_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    actor = ActorTelemetry("out/strange")
    strange = pa.table({"retrieved": [True], "error_type": [None], "usage": [{"seconds": 1.0}]})
    actor.count_unit(strange)
    actor.count_unit(strange)
    assert caplog.text.count("units are not counted in all metrics: ") == 1
