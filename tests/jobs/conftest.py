from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray

from tests.support.building import given_vectors


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
