"""One shard of an index: a FAISS index and, row by row, the passages it is about."""

import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import fs

from pipeline.decoding.types import Passage
from pipeline.retrieval.encoder import Vectors
from pipeline.retrieval.index_cache import REMEDY, SCRATCH_PREFIX, DamagedIndexError, file_digest
from pipeline.retrieval.manifest import ShardEntry
from pipeline.storage.location import Location

PASSAGE_SCHEMA = pa.schema([(name, pa.string()) for name in ("id", "title", "text")])

# FAISS asks for 39 to 256 training vectors per centroid; more of them cost encoding time and gain little.
_TRAINING_PER_CENTROID = 64
# Product quantisers learn 256 centroids in each part.
_SMALLEST_TRAINING = 256 * _TRAINING_PER_CENTROID


def empty_index(factory: str, dimension: int) -> Any:
    """An empty FAISS index for inner products, from a factory string such as ``Flat`` or ``IVF256,SQ8``.

    Raises:
        ValueError: FAISS does not understand the string, or cannot build it for this dimension and metric.
    """
    if factory.startswith("IDMap"):
        raise ValueError(f"factory {factory}: row numbers are the ids here; leave IDMap out")
    try:
        return faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ValueError(f"factory {factory}: {faiss_reason(error)} ({dimension} dimensions, inner product)") from None


def training_rows(index: Any) -> int:
    """How many vectors to train an index on; 0 where it needs no training."""
    return 0 if index.is_trained else max(_SMALLEST_TRAINING, _TRAINING_PER_CENTROID * centroids(index))


def centroids(index: Any) -> int:
    """Inverted lists of an index; 0 where it has none. It cannot be trained on fewer vectors."""
    ivf = faiss.try_extract_index_ivf(index)
    return int(ivf.nlist) if ivf is not None else 0


def train_index(index: Any, vectors: Vectors) -> None:
    """Train an index in place.

    Args:
        vectors: float32 [n, dimension].

    Raises:
        ValueError: too few vectors for this kind of index.
    """
    try:
        index.train(vectors)
    except RuntimeError as error:
        raise ValueError(f"factory: cannot be trained on {len(vectors)} passages: {faiss_reason(error)}") from None


def faiss_reason(error: RuntimeError) -> str:
    """What a FAISS error says, without where in its source it was said."""
    return " ".join(str(error).rpartition("failed: ")[2].rpartition(".cpp:")[2].split()).lstrip("0123456789: ")


# The names that ``shard_files`` gives.
SHARD_FILE = re.compile(r"shard-\d{5,}\.(faiss|passages\.arrow)")


def shard_files(number: int) -> tuple[str, str]:
    """Names of a shard's FAISS index and of its passages."""
    return f"shard-{number:05d}.faiss", f"shard-{number:05d}.passages.arrow"


def build_shard(
    folder: Location, number: int, index: Any, batches: Iterable[tuple[pa.RecordBatch, Vectors]]
) -> ShardEntry:
    """Fill a trained, empty index and write the shard's two files, each of which appears whole or not at all.

    Args:
        batches: passages in ``PASSAGE_SCHEMA`` with their vectors, float32 [rows, dimension]; not empty.

    Raises:
        StorageError: the folder cannot be written.
    """
    file, passages_file = shard_files(number)
    with _scratch(folder) as scratch:
        with pa.OSFile(str(scratch / passages_file), "wb") as sink, pa.ipc.new_file(sink, PASSAGE_SCHEMA) as writer:
            for passages, vectors in batches:
                writer.write_batch(passages)
                index.add(vectors)
        faiss.write_index(index, str(scratch / file))
        entry = _entry(scratch / file, scratch / passages_file, int(index.ntotal))
        publish_shard(scratch / passages_file, folder / passages_file)
        publish_shard(scratch / file, folder / file)
    return entry


def _entry(index: Path, passages: Path, rows: int) -> ShardEntry:
    return ShardEntry(
        file=index.name,
        passages_file=passages.name,
        rows=rows,
        bytes=index.stat().st_size,
        sha256=file_digest(index),
        passages_bytes=passages.stat().st_size,
        passages_sha256=file_digest(passages),
    )


@contextmanager
def _scratch(folder: Location) -> Iterator[Path]:
    """A temporary folder: on the target's own disk where that is local, so that files can be renamed into place."""
    if folder.local:
        Path(folder.path).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX, dir=folder.path if folder.local else None) as scratch:
        yield Path(scratch)


def publish_shard(source: Path, target: Location) -> None:
    """Move a finished local file to its place: synced and renamed on local disks, uploaded elsewhere.

    Raises:
        StorageError: the target cannot be written.
    """

    def work() -> None:
        if not target.local:
            fs.copy_files(str(source), target.path, fs.LocalFileSystem(), target.filesystem)
            return
        with source.open("rb") as file:
            os.fsync(file.fileno())
        source.replace(target.path)

    target.attempt(work)


class PassageFile:
    """The passages of a shard, read from the memory-mapped file one by one."""

    def __init__(self, path: Path) -> None:
        try:
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        except pa.ArrowInvalid as error:
            raise DamagedIndexError(f"{path}: not an Arrow IPC file ({error}); {REMEDY}") from None
        if table.schema != PASSAGE_SCHEMA:
            raise DamagedIndexError(f"{path}: expected the columns id, title and text; {REMEDY}")
        # These are views of the map: a page is read when a passage on it is.
        self._batches = table.to_batches()
        self._ends: npt.NDArray[np.int64] = np.cumsum([batch.num_rows for batch in self._batches], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def passage(self, row: int) -> Passage:
        """The passage of a row."""
        number = int(np.searchsorted(self._ends, row, side="right"))
        batch = self._batches[number]
        place = row - (int(self._ends[number]) - batch.num_rows)
        return Passage(*(batch.column(name)[place].as_py() for name in PASSAGE_SCHEMA.names))


def read_faiss(path: Path) -> Any:
    """Map a FAISS index into memory, so that the actors of a machine share its pages.

    Raises:
        DamagedIndexError: FAISS cannot read it.
    """
    try:
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise DamagedIndexError(f"{path}: not a FAISS index ({faiss_reason(error)}); {REMEDY}") from None
