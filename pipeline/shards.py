"""One shard of an index: a FAISS index and, row by row, the passages it is about."""

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import fs
from pydantic import BaseModel, ConfigDict, Field

from pipeline.config import Positive
from pipeline.encoder import Vectors
from pipeline.storage import Location, StorageError
from pipeline.types import Passage

PASSAGE_SCHEMA = pa.schema([(name, pa.string()) for name in ("id", "title", "text")])
SCRATCH_PREFIX = ".building-"

# FAISS asks for 39 to 256 training vectors per centroid; more of them cost encoding time and gain little.
_TRAINING_PER_CENTROID = 64
# Product quantisers learn 256 centroids in each part.
_SMALLEST_TRAINING = 256 * _TRAINING_PER_CENTROID

FileName = Annotated[str, Field(pattern=r"^[^/\\]+$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ShardEntry(BaseModel):
    """What the manifest says of a shard.

    Attributes:
        file, bytes, sha256: of the FAISS index.
        passages_file, passages_bytes, passages_sha256: of the passages, an Arrow IPC file.
        rows: of both.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: FileName
    passages_file: FileName
    rows: Positive
    bytes: Positive
    sha256: Digest
    passages_bytes: Positive
    passages_sha256: Digest

    def files(self) -> tuple[tuple[str, int, str], tuple[str, int, str]]:
        """Name, size in bytes and digest of the two files."""
        index = (self.file, self.bytes, self.sha256)
        return index, (self.passages_file, self.passages_bytes, self.passages_sha256)


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


def train(index: Any, vectors: Vectors) -> None:
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
        publish(scratch / passages_file, folder / passages_file)
        publish(scratch / file, folder / file)
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


def publish(source: Path, target: Location) -> None:
    """Move a finished local file to its place: synced and renamed on local disks, uploaded elsewhere.

    Raises:
        StorageError: the target cannot be written.
    """
    try:
        if not target.local:
            fs.copy_files(str(source), target.path, fs.LocalFileSystem(), target.filesystem)
            return
        with source.open("rb") as file:
            os.fsync(file.fileno())
        source.replace(target.path)
    except OSError as error:
        raise StorageError(f"{target.uri}: {' '.join(str(error).split())}") from error


def file_digest(path: Path) -> str:
    """SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def obtain(source: Location, size: int, sha256: str, cache: Path, *, verify: bool) -> Path:
    """A local path of an index file: itself where it is local, otherwise a copy that is fetched once.

    Args:
        size: in bytes, as the manifest says.
        verify: read the whole file to check its digest; a fetched copy is always checked.

    Raises:
        ValueError: the file is missing or is not what the manifest says.
        StorageError: it cannot be fetched.
    """
    if source.local:
        check_file(Path(source.path), source.uri, size, sha256 if verify else None)
        return Path(source.path)
    cache.mkdir(parents=True, exist_ok=True)
    copy = cache / f"{sha256}-{Path(source.path).name}"
    # The lock makes several actors of one machine fetch a file once.
    with copy.with_name(f"{copy.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if copy.exists():
            check_file(copy, str(copy), size, sha256 if verify else None)
        else:
            _fetch(source, copy, size, sha256)
    return copy


def _fetch(source: Location, copy: Path, size: int, sha256: str) -> None:
    with tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX, dir=copy.parent) as scratch:
        arriving = Path(scratch) / copy.name
        try:
            fs.copy_files(source.path, str(arriving), source.filesystem, fs.LocalFileSystem())
        except FileNotFoundError:
            raise ValueError(f"{source.uri}: missing; {_REMEDY}") from None
        except OSError as error:
            raise StorageError(f"{source.uri}: {' '.join(str(error).split())}") from error
        check_file(arriving, source.uri, size, sha256)
        shutil.move(arriving, copy)


_REMEDY = "copy the whole index again, or build it anew"


def check_file(path: Path, uri: str, size: int, sha256: str | None) -> None:
    """Compare a local file with the manifest; its digest too where one is given.

    Raises:
        ValueError: missing, of another size or content; names the file.
    """
    if not path.is_file():
        raise ValueError(f"{uri}: missing; {_REMEDY}")
    check_size(uri, path.stat().st_size, size)
    if sha256 is not None and file_digest(path) != sha256:
        raise ValueError(f"{uri}: its SHA-256 is not what index.json says; {_REMEDY}")


def check_size(uri: str, found: int, size: int) -> None:
    """Compare a file's size with the manifest's.

    Raises:
        ValueError: they differ.
    """
    if found != size:
        raise ValueError(f"{uri}: has {found} bytes where index.json says {size}; {_REMEDY}")


class PassageFile:
    """The passages of a shard, read from the memory-mapped file one by one."""

    def __init__(self, path: Path) -> None:
        try:
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path}: not an Arrow IPC file ({error}); {_REMEDY}") from None
        if table.schema != PASSAGE_SCHEMA:
            raise ValueError(f"{path}: expected the columns id, title and text; {_REMEDY}")
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
        ValueError: FAISS cannot read it.
    """
    try:
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise ValueError(f"{path}: not a FAISS index ({faiss_reason(error)}); {_REMEDY}") from None
