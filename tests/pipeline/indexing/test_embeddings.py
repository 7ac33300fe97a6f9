from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.config.sections import StorageConfig
from pipeline.indexing.embeddings import Place, check_embeddings, convert_embeddings
from pipeline.storage.location import locate

FILE = locate("/data/p.parquet", StorageConfig())
PLACE = Place(FILE, np.array([40, 41, 47]), "vector")
TYPES = [
    pa.list_(pa.float32()),
    pa.list_(pa.float64()),
    pa.large_list(pa.float32()),
    pa.list_(pa.float32(), 2),
    pa.list_(pa.float16(), 2),
]


def numbers(kind: pa.DataType, rows: list[list[Any] | None]) -> pa.Array:
    if kind.value_type == pa.float16():
        rows = [row and [np.float16(x) for x in row] for row in rows]
    return pa.array(rows, kind)


@pytest.mark.parametrize("kind", TYPES)
def test_vectors_are_kept_or_normalized(kind: pa.DataType) -> None:
    rows = numbers(kind, [[9, 9], [3, 4], [0, -2], [5, 12]])[1:]
    as_they_are = convert_embeddings(rows, 2, False, PLACE)
    np.testing.assert_array_equal(as_they_are, [[3, 4], [0, -2], [5, 12]])
    assert (as_they_are.dtype, as_they_are.flags.c_contiguous) == (np.float32, True)
    unit = convert_embeddings(rows, 2, True, PLACE)
    np.testing.assert_allclose(unit, np.array([[0.6, 0.8], [0, -1], [5 / 13, 12 / 13]]), rtol=1e-6)


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([[1, 0], [1], [1, 2, 3]], "row 41: column vector has 1 values, but the encoder's vectors have 2"),
        ([[1, 0], [1, 1], None], "row 47: column vector has 0 values"),
        ([[1, 0], [1, float("nan")], [1, 1]], "row 41: column vector has a non-finite value"),
        ([[float("inf"), 0], [1, 1], [1, 1]], "row 40: column vector has a non-finite value"),
        ([[1, None], [1, 1], [1, 1]], "row 40: column vector has a non-finite value"),
        ([[1, 0], [1, 1], [0, 0]], "row 47: column vector is all zeros"),
    ],
)
def test_wrong_vectors_name_file_row_and_column(rows: list[list[float]], problem: str) -> None:
    with pytest.raises(ValueError, match=f"^/data/p.parquet: {problem}"):
        convert_embeddings(pa.array(rows, pa.list_(pa.float32())), 2, True, PLACE)


def test_zero_vectors_are_accepted_without_normalization() -> None:
    zeros = pa.array([[0.0, 0.0]], pa.list_(pa.float32()))
    np.testing.assert_array_equal(convert_embeddings(zeros, 2, False, PLACE), [[0, 0]])


@pytest.mark.parametrize("kind", TYPES)
def test_columns_of_float_lists_are_accepted(kind: pa.DataType) -> None:
    check_embeddings(FILE, pa.schema([("vector", kind)]), "vector")


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ([("id", pa.string())], "column vector is missing; set --embeddings to the column"),
        ([("vector", pa.float32())], "column vector is float; convert it to a list of floats"),
        ([("vector", pa.list_(pa.int64()))], "column vector is list<.*int64>; convert it to a list of floats"),
    ],
)
def test_other_columns_are_refused(schema: list[tuple[str, pa.DataType]], problem: str) -> None:
    with pytest.raises(ValueError, match=f"^/data/p.parquet: {problem}"):
        check_embeddings(FILE, pa.schema(schema), "vector")
