"""The queries of a large remote set are read by all machines of a cluster, and not by the driver alone."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from pipeline.config.sections import Columns, ExecutionConfig, StorageConfig
from pipeline.nodes.spread import ClusterSpread
from pipeline.queries.query_set import inspect_queries
from pipeline.storage.location import Location, locate
from pipeline.storage.parquet import encode_parquet
from tests.support.s3 import S3Server, serving_s3

COLUMNS = Columns()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster of two machines, which know nothing of a store."""
    from ray.cluster_utils import Cluster

    ray.shutdown()
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    yield made.address
    ray.shutdown()
    made.shutdown()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, address: str) -> Iterator[S3Server]:
    """A store that starts after the cluster: its machines do not inherit the variables that lead to it."""
    with serving_s3(tmp_path_factory.mktemp("store")) as server:
        yield server


@pytest.fixture
def spread(address: str) -> ClusterSpread:
    found = ClusterSpread.of(ExecutionConfig(ray_address=address))
    assert found is not None
    return found


def name(*names: str) -> list[Location]:
    """Files of a folder that need not exist."""
    return [locate(f"/nowhere/{name}", StorageConfig()) for name in names]


def tell(file: Location) -> tuple[str, int, str]:
    return file.name, os.getpid(), ray.get_runtime_context().get_node_id()


def fail_at_three(file: Location) -> str:
    if file.name == "3":
        raise ValueError("item 3 is bad")
    return file.name


def die(_: Location) -> None:
    os._exit(1)


def test_no_cluster_has_no_spread(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert ClusterSpread.of(ExecutionConfig()) is None
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert ClusterSpread.of(ExecutionConfig()) == ClusterSpread(ExecutionConfig())


def test_results_are_in_order_and_reduced_by_the_driver(spread: ClusterSpread):
    drivers = []

    def reduce(found: tuple[str, int, str]) -> tuple[str, int, str]:
        drivers.append(os.getpid())
        return found

    names = [str(number) for number in range(40)]
    found = spread(tell, name(*names), reduce)
    assert [item for item, _, _ in found] == names
    assert set(drivers) == {os.getpid()}
    assert os.getpid() not in {process for _, process, _ in found}
    assert len({node for _, _, node in found}) == 2


def test_what_the_work_raises_is_raised(spread: ClusterSpread):
    with pytest.raises(ValueError, match=r"^item 3 is bad$"):
        spread(fail_at_three, name(*"01234"), lambda found: found)


def test_file_whose_tasks_die_is_named(spread: ClusterSpread):
    with pytest.raises(RuntimeError, match=r"^/nowhere/a: reading it on the cluster failed: [^\n]*$"):
        spread(die, name("a"), lambda found: found)


def wait_a_second(file: Location) -> str:
    time.sleep(1.0)
    return file.name


def test_a_wait_for_busy_machines_is_reported(spread: ClusterSpread, monkeypatch: pytest.MonkeyPatch, caplog: Any):
    monkeypatch.setattr("pipeline.nodes.spread.PATIENCE_S", 0.4)
    assert spread(wait_a_second, name("a"), lambda found: found) == ["a"]
    assert "no task has ended for 0 s; are the CPUs of the cluster in use?" in caplog.text


def write_set(store: S3Server, name: str, *files: list[str]) -> Any:
    access = {"endpoint_url": store.endpoint, "access_key": store.access_key, "secret_key": store.secret_key}
    folder = locate(f"s3://{store.bucket}/{name}", StorageConfig.model_validate({**access, "region": "us-east-1"}))
    for number, ids in enumerate(files):
        table = pa.table({"id": ids, "query": ["?"] * len(ids), "task": ["t"] * len(ids)})
        (folder / f"{number}.parquet").write(encode_parquet(table, 2))
    return folder


def test_a_large_remote_set_is_read_by_the_cluster(
    spread: ClusterSpread, store: S3Server, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    folder = write_set(store, "large", ["a", "b", "c"], ["d"], ["e", "f"])
    alone = inspect_queries(folder, COLUMNS, 2)
    monkeypatch.setattr("pipeline.queries.query_set.SPREAD_BYTES", 1)
    monkeypatch.setattr("pipeline.queries.inspection._inspect_stream", None)  # of the driver
    assert inspect_queries(folder, COLUMNS, 2, spread=spread) == alone
    assert alone.tasks == {"t": 6}


def test_a_fault_that_another_machine_finds_is_one_line(
    spread: ClusterSpread, store: S3Server, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    monkeypatch.setattr("pipeline.queries.query_set.SPREAD_BYTES", 1)
    folder = write_set(store, "double", ["a", "b"], ["c", "a"])
    with pytest.raises(ValueError, match=r"^id 'a' is not unique: .*/0\.parquet row 0, .*/1\.parquet row 1$"):
        inspect_queries(folder, COLUMNS, 2, spread=spread)
    (folder / "1.parquet").write(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"^s3://.*/double/1\.parquet: not a readable Parquet file: [^\n]*$"):
        inspect_queries(folder, COLUMNS, 2, spread=spread)


def test_a_local_set_is_read_by_the_driver(spread: ClusterSpread, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pipeline.queries.query_set.SPREAD_BYTES", 1)
    pq.write_table(pa.table({"id": ["a"], "query": ["?"]}), tmp_path / "a.parquet")

    monkeypatch.setattr(ClusterSpread, "__call__", None)  # other machines may see another file there
    assert inspect_queries(locate(str(tmp_path), StorageConfig()), COLUMNS, 2, spread=spread).rows == 1
