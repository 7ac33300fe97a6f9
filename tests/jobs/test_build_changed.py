"""Passage files that are replaced while an index is built from them."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.indexing import build_pool
from tests.support.building import run

VECTORS = ["--embeddings", "vector"]
pytestmark = pytest.mark.usefixtures("lasting_ray")


def touch(file: Path) -> None:
    os.utime(file, (1e9, 1e9))


def rewrite(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])


def grow(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"x")


def delete(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (touch, VECTORS),
        pytest.param(rewrite, VECTORS, marks=pytest.mark.slow),
        pytest.param(grow, VECTORS, marks=pytest.mark.slow),
        (delete, VECTORS),
        pytest.param(rewrite, [], marks=pytest.mark.slow),
    ],
)
def test_passages_that_change_during_the_build_leave_no_index(
    with_vectors: tuple[Path, np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], None],
    options: list[str],
) -> None:
    source, unchanged = with_vectors[0], build_pool.build_shards
    file = next(source.glob("*.parquet")) if source.is_dir() else source

    def build_then_change(*arguments: object) -> object:
        reports = unchanged(*arguments)  # type: ignore[arg-type]
        change(file)
        return reports

    monkeypatch.setattr(build_pool, "build_shards", build_then_change)
    result = run(source, tmp_path / "out", *options)
    assert result.exit_code != 0
    assert result.stderr.splitlines()[-1] == (
        f"error: passages {file}: changed during the build; start over with --overwrite"
    )
    assert not (tmp_path / "out" / "index.json").exists()
