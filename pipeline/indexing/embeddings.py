"""Check and convert vectors that come with the passages in a Parquet column."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.retrieval.encoder import Vectors
from pipeline.storage.location import Location


def check_embeddings(file: Location, schema: pa.Schema, column: str) -> None:
    """Check that a file has a column of vectors.

    Raises:
        ValueError: the column is missing, or is not a list of floats.
    """
    if column not in schema.names:
        raise ValueError(f"{file.uri}: column {column} is missing; set --embeddings to the column of the vectors")
    kind = schema.field(column).type
    listed = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not (listed and pa.types.is_floating(kind.value_type)):
        raise ValueError(f"{file.uri}: column {column} is {kind}; convert it to a list of floats")


@dataclass(frozen=True)
class Place:
    """The origin of vectors, for messages.

    Attributes:
        file: file of the vectors.
        rows: row numbers in the file, from 0: int64 [rows].
        column: column of the vectors.
    """

    file: Location
    rows: npt.NDArray[np.int64]
    column: str

    def build_error(self, wrong: npt.NDArray[np.bool_], problem: str) -> ValueError:
        """Return an error about the first of the wrong rows.

        Args:
            wrong: mask of the wrong rows, of which at least one is set: bool [rows].
            problem: continuation of the message after the column's name.
        """
        return ValueError(f"{self.file.uri}: row {self.rows[np.argmax(wrong)]}: column {self.column} {problem}")


def convert_embeddings(embeddings: pa.Array, dimension: int, normalised: bool, place: Place) -> Vectors:
    """Convert a list array to vectors: float32 [rows, dimension].

    Args:
        embeddings: array of lists of floats.
        dimension: dimension of the encoder's vectors.
        normalised: whether to scale the vectors to unit length.
        place: origin of the vectors, for messages.

    Raises:
        ValueError: a vector is null, of another dimension, not finite, or zero where it must be normalized; names
            file, row and column.
    """
    sizes = pc.fill_null(pc.list_value_length(embeddings), 0).to_numpy(zero_copy_only=False)
    if (wrong := sizes != dimension).any():
        raise place.build_error(
            wrong, f"has {sizes[np.argmax(wrong)]} values, but the encoder's vectors have {dimension}"
        )
    flat = embeddings.flatten().cast(pa.float32())
    vectors: Vectors = flat.to_numpy(zero_copy_only=False).reshape(-1, dimension)  # a null in a vector becomes NaN
    if (wrong := np.logical_not(np.isfinite(vectors).all(axis=1))).any():
        raise place.build_error(wrong, "has a non-finite value")
    if not normalised:
        return np.ascontiguousarray(vectors)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    if (wrong := lengths[:, 0] == 0).any():
        raise place.build_error(wrong, "is all zeros and cannot be normalized")
    unit: Vectors = vectors / lengths
    return unit
