import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner

from jobs.benchmark.index import FILE_ROWS, Comparison, benchmark_index, draw_all_vectors, draw_clustered, write_vectors
from tests.conftest import DEMO


def test_ratio_is_of_medians() -> None:
    assert Comparison("x", "1/s", ours=[1.0, 90.0, 100.0], bare=[100.0, 120.0, 900.0]).ratio == 0.75


def test_vectors_in_memory_and_in_files_are_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.benchmark.index.FILE_ROWS", 40)
    assert FILE_ROWS == 250_000
    write_vectors(100, 8, tmp_path / "vectors")
    table = pq.read_table(tmp_path / "vectors")
    np.testing.assert_array_equal(table["vector"].to_pylist(), draw_all_vectors(100, 8))
    assert table["id"].to_pylist() == [str(n) for n in range(100)]


def test_clustered_vectors_have_near_neighbors() -> None:
    vectors = draw_clustered(300, 64)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    nearest = np.sort(vectors @ vectors.T, axis=1)[:, -2]
    assert 0.3 < nearest.max() < 0.9


@pytest.mark.slow
def test_index_benchmark_compares_equal_work(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(benchmark_index)
    file = tmp_path / "figures.json"
    sizes = ["--encoded", "64", "--reranked", "1", "--vectors", "10000", "--shards", "2", "--repeats", "1"]
    probes = ["--factory", "IVF16,Flat", "--search", "nprobe=16", "--json", str(file), "--scratch", str(tmp_path)]
    result = CliRunner().invoke(app, ["--passages", str(DEMO / "passages.parquet"), *sizes, *probes])
    assert result.exit_code == 0, result.output
    figures = {figure["name"]: figure for figure in json.loads(file.read_text())["figures"]}
    assert list(figures) == [
        "encode and build",
        "encode and build, with checks and startup",
        "rerank",
        "Flat: build from precomputed vectors",
        "Flat: search",
        "Flat: filtered, cast(id as int) % 2 = 0",
        "Flat: filtered, cast(id as int) % 100 = 0",
        "IVF16,Flat: build from precomputed vectors",
        "IVF16,Flat nprobe=16: search",
        "IVF16,Flat nprobe=16: filtered, cast(id as int) % 2 = 0",
        "IVF16,Flat nprobe=16: filtered, cast(id as int) % 100 = 0",
    ]
    for name in ("Flat: search", "IVF16,Flat nprobe=16: search"):
        assert "same for 100 % of queries" in figures[name]["note"]
    assert all(figure["ours"][0] > 0 and figure["bare"][0] > 0 for figure in figures.values())
