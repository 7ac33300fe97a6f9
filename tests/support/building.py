"""Calls of ``jobs.build_index``, and passages for them."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import typer
from typer.testing import CliRunner, Result

from jobs.build_index import build_index
from tests.support.indexes import numbered

app = typer.Typer()
app.command()(build_index)


def run(passages: Path, output: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["--passages", str(passages), "--output", str(output), *options])


def given_vectors(rows: int, start: int = 0) -> tuple[pa.Table, np.ndarray]:
    """Passages with vectors of the demo encoder's size, and these with unit length."""
    vectors = np.random.default_rng(start).normal(size=(rows, 384)).astype(np.float32)
    column = pa.FixedSizeListArray.from_arrays(vectors.ravel(), 384)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return pa.table({**numbered(rows, start), "vector": column}), unit
