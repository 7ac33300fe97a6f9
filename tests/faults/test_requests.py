"""The requests of a run to its object store are a fixed number for each file of queries and each unit.

``infra/RELIABILITY.md`` states these numbers; the store's own retries and Ray's are not among them.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiohttp import web

from jobs.benchmark.growth import RepeatingActor, make_rows
from pipeline.config.run import RunConfig
from pipeline.run.driver import allot_resources, run_plan
from pipeline.run.plan import check_run
from pipeline.storage.location import locate
from pipeline.storage.parquet import encode_parquet
from tests.faults.proxy import FaultProxy, Faults
from tests.support.s3 import S3Server

pytestmark = pytest.mark.slow

UNIT_ROWS, UNITS_OF_A_FILE = 10, 5


class Counting(FaultProxy):
    """Counts requests: listings, and the others by method."""

    def __init__(self, target: str) -> None:
        super().__init__(target, Faults(), 0)
        self.counts = Counter[str]()

    async def _pass(self, request: web.Request) -> web.StreamResponse:
        self.counts["LIST" if "list-type" in request.query else request.method] += 1
        return await super()._pass(request)


@pytest.fixture
def counting(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counting]:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    proxy = Counting(s3.endpoint)
    with proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


def count_requests(counting: Counting, folder: str, files: int) -> dict[str, Counter[str]]:
    """Requests of the phases of a run over so many files."""
    rows = UNIT_ROWS * UNITS_OF_A_FILE
    config = RunConfig.model_validate(
        {
            "queries": f"{folder}/queries",
            "output": f"{folder}/out",
            "model": {"name": "demo"},
            "decoding": {"mode": "never"},
            "execution": {"unit_rows": UNIT_ROWS, "actors": 1, "cpus_per_actor": 1, "gpus_per_actor": 0},
        }
    )
    for number in range(files):
        file = locate(config.queries, config.storage) / f"{number}.parquet"
        file.write(encode_parquet(make_rows(number * rows, rows)))
    found = {}
    counting.counts.clear()
    plan = check_run(config)
    found["plan"] = counting.counts.copy()
    counting.counts.clear()
    run_plan(plan, allot_resources(plan), RepeatingActor)
    found["run"] = counting.counts.copy()
    counting.counts.clear()
    assert check_run(config).finished
    found["repeat"] = counting.counts.copy()
    return found


def test_requests_grow_with_files_and_units(counting: Counting, s3: S3Server, tmp_path: Path) -> None:
    few, many = (count_requests(counting, f"s3://{s3.bucket}/{tmp_path.name}-{files}", files) for files in (4, 12))

    def compute_growth(phase: str, per: int) -> dict[str, float]:
        return {kind: (many[phase][kind] - few[phase][kind]) / per for kind in ("LIST", "HEAD", "GET", "PUT")}

    assert compute_growth("plan", 8) == {"LIST": 0, "HEAD": 1, "GET": 1, "PUT": 0}  # for each file
    assert compute_growth("repeat", 8) == {"LIST": 0, "HEAD": 1, "GET": 0, "PUT": 0}
    # For each unit, its query file, its report and some heartbeats of the lease included.
    run, most = compute_growth("run", 8 * UNITS_OF_A_FILE), {"LIST": 1.1, "HEAD": 4.5, "GET": 1.5, "PUT": 1.1}
    assert {kind: count for kind, count in run.items() if count > most[kind]} == {}
