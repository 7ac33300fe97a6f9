import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray

from pipeline.output import compaction_plan
from pipeline.output.unit_log import read_units
from tests.support.building import given_vectors
from tests.support.compaction import QUERIES, at
from tests.support.runs import ScriptedRun, write_queries


@pytest.fixture(scope="module")
def lasting_ray() -> Iterator[None]:
    """Ray stays up from one build to the next."""
    was_running = ray.is_initialized()
    yield
    if not was_running:
        ray.shutdown()


@pytest.fixture
def with_vectors(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """Three hundred passages with their vectors in two files."""
    (tmp_path / "passages").mkdir()
    tables, vectors = zip(*(given_vectors(150, start) for start in (0, 150)), strict=True)
    for name, table in zip("ab", tables, strict=True):
        pq.write_table(table, tmp_path / "passages" / f"{name}.parquet", row_group_size=64)
    return tmp_path / "passages", np.concatenate(vectors)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> ScriptedRun:
    """A finished set of eight rows in four units, of which two have a failed row."""
    folder = tmp_path_factory.mktemp("compact")
    write_queries(folder / "queries" / "a.parquet", **QUERIES)
    run = ScriptedRun(folder / "queries", folder / "out", demo_model)
    assert run.annotate().exit_code == 3
    return run


@pytest.fixture
def copied_run(finished_run: ScriptedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ScriptedRun:
    """A copy of the set; leases on it settle at once."""
    monkeypatch.setattr("pipeline.storage.lease.SETTLE_S", 0.01)
    shutil.copytree(finished_run.output, tmp_path / "out")
    return ScriptedRun(finished_run.queries, tmp_path / "out", finished_run.model)


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch, copied_run: ScriptedRun) -> None:
    """Files of two units: --file-mb 1 is the size of two of this set's files."""
    sizes = [unit.data_bytes for unit in read_units(at(copied_run.output)).values()]
    monkeypatch.setattr(compaction_plan, "MEGABYTE", max(sizes) * 2)
