"""Builds and reads the two files of a shard: a FAISS index, and the passages with the same row numbers."""

import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import fs

from pipeline.decoding.types import Passage
from pipeline.retrieval.encoder import Vectors
from pipeline.retrieval.filters import RowSelection, select_rows
from pipeline.retrieval.index_cache import REMEDY, SCRATCH_PREFIX, DamagedIndexError, hash_file
from pipeline.retrieval.manifest import ShardEntry
from pipeline.retrieval.passage_columns import PASSAGE_SCHEMA, MetadataType, extend_schema, format_metadata
from pipeline.storage.location import Location

REMOVED_SCHEMA = pa.schema([("row", pa.int64())])

# FAISS recommends 39 to 256 training vectors per centroid; more than these take encoding time and gain little.
_TRAINING_PER_CENTROID = 64
# Product quantizers learn 256 centroids per subquantizer.
_SMALLEST_TRAINING = 256 * _TRAINING_PER_CENTROID


def create_empty_index(factory: str, dimension: int) -> Any:
    """Create an empty FAISS index for inner products from a factory string such as ``Flat`` or ``IVF256,SQ8``.

    Raises:
        ValueError: FAISS does not know the factory string or does not support it for this dimension and metric, or it
            begins with ``IDMap``.
    """
    if factory.startswith("IDMap"):
        raise ValueError(f"factory {factory}: ids are row numbers; leave IDMap out")
    try:
        return faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ValueError(
            f"factory {factory}: {extract_faiss_message(error)} ({dimension} dimensions, inner product)"
        ) from None


def count_training_rows(index: Any) -> int:
    """Return the number of vectors to train an index on; 0 if it needs no training."""
    return 0 if index.is_trained else max(_SMALLEST_TRAINING, _TRAINING_PER_CENTROID * count_centroids(index))


def count_centroids(index: Any) -> int:
    """Count the inverted lists of an index, the minimum of training vectors; 0 if it has none."""
    ivf = faiss.try_extract_index_ivf(index)
    return int(ivf.nlist) if ivf is not None else 0


def train_index(index: Any, vectors: Vectors) -> None:
    """Train an index in place.

    Args:
        index: a FAISS index.
        vectors: float32 [n, dimension].

    Raises:
        ValueError: FAISS cannot train the index, for example on too few vectors.
    """
    try:
        index.train(vectors)
    except RuntimeError as error:
        raise ValueError(
            f"factory: cannot be trained on {len(vectors)} passages: {extract_faiss_message(error)}"
        ) from None


def extract_faiss_message(error: RuntimeError) -> str:
    """Return the message of a FAISS error without the location in its source."""
    return " ".join(str(error).rpartition("failed: ")[2].rpartition(".cpp:")[2].split()).lstrip("0123456789: ")


# Matches the files of a shard in the folder of an index, or of an update of it, and of the manifests of both.
INDEX_FILE = re.compile(
    r"(update-[0-9]{5}/)?(shard-[0-9]{5,9}\.(faiss|passages\.arrow|lexical\.arrow|removed\.arrow)|index(-[0-9a-f]{16})?\.json)"
)


def name_shard_files(number: int) -> tuple[str, str]:
    """Return the file names of a shard's FAISS index and of its passages."""
    return f"shard-{number:05d}.faiss", f"shard-{number:05d}.passages.arrow"


def name_lexical_file(number: int) -> str:
    """Return the file name of a shard's lexical part."""
    return f"shard-{number:05d}.lexical.arrow"


def write_removed_rows(file: Path, rows: npt.NDArray[np.int64]) -> None:
    """Write the rows of removed passages, int64 [rows], ascending."""
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, REMOVED_SCHEMA) as writer:
        writer.write_batch(pa.record_batch([pa.array(rows)], schema=REMOVED_SCHEMA))


def read_removed_rows(source: Any, name: str) -> npt.NDArray[np.int64]:
    """Read the rows of removed passages, int64 [rows], ascending.

    Args:
        source: an open Arrow file.
        name: name of the file, for messages.

    Raises:
        DamagedIndexError: it is not such a file.
    """
    try:
        table = pa.ipc.open_file(source).read_all()
    except pa.ArrowInvalid as error:
        raise DamagedIndexError(f"{name}: not an Arrow IPC file ({error}); {REMEDY}") from None
    if table.schema != REMOVED_SCHEMA:
        raise DamagedIndexError(f"{name}: expected the column row; {REMEDY}")
    return np.asarray(table["row"].to_numpy(), np.int64)


def build_shard(
    folder: Location,
    number: int,
    index: Any,
    batches: Iterable[tuple[pa.RecordBatch, Vectors]],
    schema: pa.Schema = PASSAGE_SCHEMA,
) -> ShardEntry:
    """Fill an index and write the two files of the shard, each atomically.

    Args:
        folder: folder of the index.
        number: number of the shard.
        index: a trained, empty FAISS index.
        batches: passages with their vectors, float32 [rows, dimension]; not empty.
        schema: schema of the passages.

    Raises:
        StorageError: the folder cannot be written.
    """
    file, passages_file = name_shard_files(number)
    with _create_scratch(folder) as scratch:
        with pa.OSFile(str(scratch / passages_file), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for passages, vectors in batches:
                writer.write_batch(passages)
                index.add(vectors)
        faiss.write_index(index, str(scratch / file))
        entry = _build_entry(scratch / file, scratch / passages_file, int(index.ntotal))
        publish_shard(scratch / passages_file, folder / passages_file)
        publish_shard(scratch / file, folder / file)
    return entry


def _build_entry(index: Path, passages: Path, rows: int) -> ShardEntry:
    return ShardEntry(
        file=index.name,
        passages_file=passages.name,
        rows=rows,
        bytes=index.stat().st_size,
        sha256=hash_file(index),
        passages_bytes=passages.stat().st_size,
        passages_sha256=hash_file(passages),
    )


@contextmanager
def _create_scratch(folder: Location) -> Iterator[Path]:
    """Create a temporary folder, inside a local target folder so that files can be renamed into place."""
    if folder.local:
        Path(folder.path).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX, dir=folder.path if folder.local else None) as scratch:
        yield Path(scratch)


def publish_shard(source: Path, target: Location) -> None:
    """Publish a finished local file: sync and rename it if the target is local, otherwise upload it.

    Raises:
        StorageError: the target cannot be written.
    """

    def publish() -> None:
        if not target.local:
            fs.copy_files(str(source), target.path, fs.LocalFileSystem(), target.filesystem)
            return
        with source.open("rb") as file:
            os.fsync(file.fileno())
        source.replace(target.path)

    target.retrying(publish)


class PassageFile:
    """The passages of a shard, read one by one from a memory-mapped file.

    Args:
        path: file of the passages.
        metadata: types of the columns beside id, title and text, by name.

    Raises:
        DamagedIndexError: it is not such a file.
    """

    def __init__(self, path: Path, metadata: Mapping[str, MetadataType] = MappingProxyType({})) -> None:
        try:
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        except pa.ArrowInvalid as error:
            raise DamagedIndexError(f"{path}: not an Arrow IPC file ({error}); {REMEDY}") from None
        if table.schema != extend_schema(metadata):
            columns = ", ".join(["id", "title", "text", *metadata])
            raise DamagedIndexError(f"{path}: expected the columns {columns}; {REMEDY}")
        self._metadata = tuple(metadata)
        self._table = table
        # The batches are views of the mapped file; pages are loaded when their passages are read.
        self._batches = table.to_batches()
        self._ends: npt.NDArray[np.int64] = np.cumsum([batch.num_rows for batch in self._batches], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read_passage(self, row: int) -> Passage:
        """Return the passage of a row."""
        number = int(np.searchsorted(self._ends, row, side="right"))
        batch = self._batches[number]
        place = row - (int(self._ends[number]) - batch.num_rows)
        name, title, text = (batch.column(name)[place].as_py() for name in PASSAGE_SCHEMA.names)
        metadata = {name: batch.column(name)[place].as_py() for name in self._metadata}
        return Passage(name, title, text, format_metadata(metadata) if metadata else None)

    def read_batches(self, rows: npt.NDArray[np.int64]) -> Iterator[pa.RecordBatch]:
        """Yield the passages of some rows, int64 [rows], ascending, with all their columns."""
        starts = self._ends - [batch.num_rows for batch in self._batches]
        numbers = np.searchsorted(self._ends, rows, side="right")
        for number in np.unique(numbers).tolist():
            yield self._batches[number].take(pa.array(rows[numbers == number] - starts[number]))

    def select(self, condition: str) -> RowSelection:
        """Select the passages that a condition holds for.

        Raises:
            FilterError: it is no condition on these passages.
        """
        return select_rows(condition, self._table)


def read_faiss(path: Path) -> Any:
    """Map a FAISS index into memory, so that all actors on a machine share its pages.

    Raises:
        DamagedIndexError: FAISS cannot read it.
    """
    try:
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise DamagedIndexError(f"{path}: not a FAISS index ({extract_faiss_message(error)}); {REMEDY}") from None
