"""The index: its manifest, and search over all of its shards."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import faiss
import numpy as np
import numpy.typing as npt
from pyarrow import fs
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.config import Positive, RetrievalConfig
from pipeline.encoder import Encoder, Vectors, encoder_digest
from pipeline.shards import (
    PassageFile,
    ShardEntry,
    check_size,
    faiss_reason,
    obtain,
    read_faiss,
)
from pipeline.storage import Location, StorageError
from pipeline.types import RetrievedPassage

MANIFEST = "index.json"

# Equal scores beyond this many places keep the order FAISS gives them. Its GPU search stops at 2,048.
_MOST_PLACES = 1024


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EncoderEntry(_Frozen):
    """The encoder that an index was built with; attributes as those of ``Encoder``."""

    name: str
    revision: str | None
    digest: str


class IndexManifest(_Frozen):
    """``index.json``: everything about an index but its vectors and passages.

    Attributes:
        metric, normalised: vectors have unit length, so inner products are cosines.
        factory: FAISS factory string of every shard.
        passages: in all shards.
        shards: in the order of the passages.
    """

    format_version: Literal[1] = 1
    encoder: EncoderEntry
    dimension: Positive
    metric: Literal["inner_product"] = "inner_product"
    normalised: Literal[True] = True
    factory: str
    passages: Positive
    shards: Annotated[tuple[ShardEntry, ...], Field(min_length=1)]

    def digest(self) -> str:
        """SHA-256, in hex, of everything above: with the shards' own digests, the identity of the whole index."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    @model_validator(mode="after")
    def _counts_agree(self) -> "IndexManifest":
        if sum(shard.rows for shard in self.shards) != self.passages:
            raise ValueError(f"the shards do not hold {self.passages} passages together")
        return self


def write_manifest(folder: Location, manifest: IndexManifest) -> None:
    """Write ``index.json``, which makes the folder an index: the last step of a build."""
    (folder / MANIFEST).write(manifest.model_dump_json(indent=2).encode() + b"\n")


def read_manifest(folder: Location) -> IndexManifest:
    """Read ``index.json``.

    Raises:
        ValueError: there is none, or it is damaged or of another version; names file and key.
        StorageError: it cannot be read.
    """
    file = folder / MANIFEST
    if file.kind() != fs.FileType.File:
        raise ValueError(f"{folder.uri}: no index here ({MANIFEST} is missing); build one with jobs.build_index")
    try:
        return IndexManifest.model_validate_json(file.read())
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        found = f", found {problem['input']!r}" if problem["type"] == "literal_error" else ""
        where = f"key {key}: " if key else ""
        raise ValueError(
            f"{file.uri}: {where}{problem['msg'].lower()}{found}; build the index anew with this version"
        ) from None


def check_encoder(encoder: Encoder, manifest: IndexManifest) -> None:
    """Refuse an encoder other than the one an index was built with; its name may differ, its content may not.

    Raises:
        ValueError: digest or dimension differ.
    """
    if encoder.dimension != manifest.dimension:
        raise ValueError(
            f"encoder {encoder.name} gives {encoder.dimension} dimensions, the index has {manifest.dimension}: "
            f"{_encoder_advice(manifest)}"
        )
    _check_digest(encoder.name, encoder.digest, manifest)


def _check_digest(name: str, digest: str | None, manifest: IndexManifest) -> None:
    built = manifest.encoder
    if digest != built.digest:
        raise ValueError(
            f"encoder {name} (digest {(digest or 'unknown')[:12]}) is not the one that the index was built with "
            f"({built.name}, digest {built.digest[:12]}): {_encoder_advice(manifest)}"
        )


def _encoder_advice(manifest: IndexManifest) -> str:
    return f"set retrieval.encoder to {manifest.encoder.name} as it was then, or build the index anew"


def check_index(folder: Location, retrieval: RetrievalConfig) -> IndexManifest:
    """Check what can be checked without opening an index: manifest, encoder, file sizes, search parameters.

    Raises:
        ValueError: no usable index, or one that the configuration does not match; one line with advice.
        StorageError: storage does not answer.
    """
    manifest = read_manifest(folder)
    parse_search(retrieval.search)
    wanted, revision = wanted_encoder(manifest, retrieval)
    digest = encoder_digest(wanted, revision)
    if digest is not None or wanted != manifest.encoder.name:
        _check_digest(wanted, digest, manifest)  # a model not downloaded yet is compared when it is
    files = [file for shard in manifest.shards for file in shard.files()]
    try:
        found = folder.filesystem.get_file_info([(folder / name).path for name, _, _ in files])
    except OSError as error:
        raise StorageError(f"{folder.uri}: {' '.join(str(error).split())}") from error
    for (name, size, _), info in zip(files, found, strict=True):
        if info.type != fs.FileType.File:
            raise ValueError(f"{(folder / name).uri}: missing; copy the whole index again, or build it anew")
        check_size((folder / name).uri, info.size, size)
    return manifest


def wanted_encoder(manifest: IndexManifest, retrieval: RetrievalConfig) -> tuple[str, str | None]:
    """Name and revision of the encoder to search with: the configured one, or the one that the index was built with."""
    if retrieval.encoder in (None, manifest.encoder.name):
        return manifest.encoder.name, manifest.encoder.revision
    return str(retrieval.encoder), None


def parse_search(search: str) -> dict[str, float]:
    """FAISS search parameters from a string such as ``nprobe=16,efSearch=64``.

    Raises:
        ValueError: it does not have this form.
    """
    parameters: dict[str, float] = {}
    for item in filter(None, (part.strip() for part in search.split(","))):
        name, _, value = item.partition("=")
        try:
            parameters[name.strip()] = float(value)
        except ValueError:
            raise ValueError(f"retrieval.search {search}: expected NAME=NUMBER,… such as nprobe=16") from None
        if not 0 < parameters[name.strip()] < float("inf"):
            raise ValueError(f"retrieval.search {search}: {name.strip()} must be above 0")
    return parameters


@dataclass(frozen=True)
class Hit:
    """A vector found: its inner product with the query, its shard and its row there."""

    score: float
    shard: int
    row: int


class Shard:
    """An opened shard."""

    def __init__(self, index: Any, passages: PassageFile) -> None:
        self.index = index
        self.passages = passages

    @classmethod
    def open(cls, folder: Location, entry: ShardEntry, dimension: int, retrieval: RetrievalConfig) -> "Shard":
        """Fetch the files where they are remote, check them, map them.

        Raises:
            ValueError: a file is missing or is not what the manifest says, or a search parameter does not apply.
        """
        cache = Path(retrieval.cache).expanduser()
        index_file, passages_file = (
            obtain(folder / name, size, sha256, cache, verify=retrieval.verify) for name, size, sha256 in entry.files()
        )
        index, passages = read_faiss(index_file), PassageFile(passages_file)
        if (index.d, index.ntotal, len(passages)) != (dimension, entry.rows, entry.rows):
            raise ValueError(
                f"{(folder / entry.file).uri}: {index.ntotal} vectors of {index.d} dimensions and {len(passages)} "
                f"passages where index.json says {entry.rows} and {dimension}; build the index anew"
            )
        index, space = _on_device(index, retrieval.device)
        _set_search(index, space, retrieval.search)
        return cls(index, passages)

    def top(self, queries: Vectors, k: int) -> tuple[Vectors, npt.NDArray[np.int64]]:
        """The best rows: scores float32 and rows int64, both [queries, k or fewer]; row -1 where FAISS found none.

        FAISS leaves open which of several equal scores it returns. Looking one place beyond k shows whether the
        last place is contested; then the search widens until all who contest it are there, and the first rows win.
        """
        total = self.index.ntotal
        width = min(k + 1, total)
        while True:
            scores, rows = self.index.search(queries, width)
            contested = (scores[:, min(k, width) - 1] == scores[:, -1]) & (rows[:, -1] >= 0)
            if width <= k or width == total or width >= _MOST_PLACES or not contested.any():
                break
            width = min(2 * width, total, _MOST_PLACES)
        order = np.lexsort((rows, -scores))[:, :k]
        return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)


class PassageIndex:
    """All shards of an index, searched as if they were one."""

    def __init__(self, manifest: IndexManifest, shards: list[Shard], threads: int = 1) -> None:
        self.manifest = manifest
        self._shards = shards
        self._threads = threads

    @classmethod
    def open(cls, folder: Location, retrieval: RetrievalConfig) -> "PassageIndex":
        """Open an index: in place from a local disk, by way of ``retrieval.cache`` from elsewhere.

        Raises:
            ValueError: no usable index; one line that names the file.
            StorageError: storage does not answer.
        """
        manifest = read_manifest(folder)
        shards = [Shard.open(folder, entry, manifest.dimension, retrieval) for entry in manifest.shards]
        return cls(manifest, shards, retrieval.threads)

    def search(self, queries: Vectors, k: int) -> list[list[Hit]]:
        """The k best of all shards for each query, best first; equal scores by shard, then row.

        Args:
            queries: float32 [n, dimension], of unit length.

        Returns:
            n lists of k hits, or fewer where the index has or finds no more.
        """
        # OpenMP keeps this number per thread, so it has to be set in the thread that searches.
        faiss.omp_set_num_threads(self._threads)
        found = [shard.top(queries, k) for shard in self._shards]
        scores = np.concatenate([scores for scores, _ in found], axis=1)
        rows = np.concatenate([rows for _, rows in found], axis=1)
        shards = np.repeat(np.arange(len(found)), [scores.shape[1] for scores, _ in found])
        # Within a shard equal scores are in the order of their rows already.
        best = np.argsort(-scores, axis=1, kind="stable")
        return [
            [Hit(float(scores[n, i]), int(shards[i]), int(rows[n, i])) for i in best[n] if rows[n, i] >= 0][:k]
            for n in range(len(queries))
        ]

    def retrieve(self, queries: Vectors, k: int) -> list[list[RetrievedPassage]]:
        """As ``search``, with the passages."""
        return [
            [
                RetrievedPassage(self._shards[hit.shard].passages.passage(hit.row), hit.score, rank)
                for rank, hit in enumerate(hits, start=1)
            ]
            for hits in self.search(queries, k)
        ]


def _on_device(index: Any, device: str) -> tuple[Any, Any]:
    """The index on its device, with the FAISS parameter space that belongs to it."""
    # The CPU build of FAISS has none of the GPU names.
    gpus = faiss.get_num_gpus() if hasattr(faiss, "StandardGpuResources") else 0
    if device == "gpu" and gpus == 0:
        raise ValueError("retrieval.device gpu: FAISS sees none; install the gpu extra, or set auto or cpu")
    if device == "cpu" or gpus == 0:
        return index, faiss.ParameterSpace()
    try:
        return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index), faiss.GpuParameterSpace()
    except RuntimeError as error:
        if device == "gpu":
            raise ValueError(f"retrieval.device gpu: {faiss_reason(error)}; set auto or cpu") from None
        # Graph indexes, for one, have no GPU form.
        return index, faiss.ParameterSpace()


def _set_search(index: Any, space: Any, search: str) -> None:
    for name, value in parse_search(search).items():
        try:
            space.set_index_parameter(index, name, value)
        except RuntimeError:
            kind = type(faiss.downcast_index(index)).__name__
            raise ValueError(f"retrieval.search {search}: a {kind} has no parameter {name}; leave it out") from None
