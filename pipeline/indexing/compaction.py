"""Folds an index and its updates into fresh shards: without removed passages, and without encoding any.

Codes are copied as they are. Word statistics are those of the passages that are left.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.config.sections import RetrievalConfig, StorageConfig
from pipeline.indexing.base_index import BaseIndex, get_form, read_template
from pipeline.indexing.build import BuildPlan, BuildRequest
from pipeline.indexing.build_pool import ShardBuilder, run_build
from pipeline.indexing.passages import ShardPlan
from pipeline.retrieval.encoder import Vectors
from pipeline.retrieval.index import Shard
from pipeline.retrieval.manifest import (
    MANIFEST,
    IndexManifest,
    ShardEntry,
    check_files,
    name_update,
    name_version,
    number_next_update,
    publish_version,
    read_manifest,
)
from pipeline.retrieval.shard_files import INDEX_FILE, create_empty_index
from pipeline.storage.lease import Lease
from pipeline.storage.location import Location, locate
from pipeline.storage.parquet import RowRange

# Passages copied at a time.
BATCH = 10_000
# Kinds of indexes whose vectors are copied, by where these are. Kinds derived from them may differ in that.
_CODES = (faiss.IndexFlat, faiss.IndexFlatIP, faiss.IndexScalarQuantizer, faiss.IndexPQ)
_LISTS = (faiss.IndexIVFFlat, faiss.IndexIVFScalarQuantizer, faiss.IndexIVFPQ)
_GRAPHS = (faiss.IndexHNSWFlat, faiss.IndexHNSWSQ)


def supports_copying(index: Any) -> bool:
    """Whether the vectors of this kind of index can be copied: those that hold one code for each, and HNSW over them.

    Others share codes among vectors, pack them in blocks, or would encode decoded vectors otherwise.
    """
    kind: Any = faiss.downcast_index(index)
    if isinstance(kind, faiss.IndexPreTransform):
        return supports_copying(kind.index)
    return type(kind) in (*_CODES, *_LISTS, *_GRAPHS)


def copy_vectors(source: Any, target: Any, rows: npt.NDArray[np.int64]) -> None:
    """Append vectors of an index to another one that was trained alike: their codes, as they are.

    The graph of HNSW is built anew.

    Args:
        source: index to copy from, of a kind that :func:`supports_copying` accepts.
        target: index to append to.
        rows: rows to copy, int64 [rows], ascending.
    """
    kind: Any = faiss.downcast_index(source)
    into: Any = faiss.downcast_index(target)
    if isinstance(kind, faiss.IndexPreTransform):
        copy_vectors(kind.index, into.index, rows)
        into.ntotal = into.index.ntotal
    elif type(kind) in _LISTS:
        _copy_lists(kind, into, rows)
    elif type(kind) in _CODES:
        codes = _view_codes(kind.codes.data(), kind.ntotal, kind.code_size)
        for first in range(0, len(rows), BATCH):
            into.add_sa_codes(codes[rows[first : first + BATCH]])
    else:
        for first in range(0, kind.ntotal, BATCH):
            size = min(BATCH, kind.ntotal - first)
            part = rows[slice(*np.searchsorted(rows, (first, first + size)))]
            if len(part):
                into.add(kind.reconstruct_n(first, size)[part - first])


def _copy_lists(source: Any, target: Any, rows: npt.NDArray[np.int64]) -> None:
    numbers = np.full(source.ntotal, -1, np.int64)
    numbers[rows] = target.ntotal + np.arange(len(rows))
    lists = source.invlists
    for number in range(source.nlist):
        size = lists.list_size(number)
        if not size:
            continue
        ids = numbers[faiss.rev_swig_ptr(lists.get_ids(number), size)]
        kept = _view_codes(lists.get_codes(number), size, source.code_size)[ids >= 0]
        ids = ids[ids >= 0]
        target.invlists.add_entries(number, len(ids), faiss.swig_ptr(ids), faiss.swig_ptr(kept))
    target.ntotal += len(rows)


def _view_codes(data: Any, size: int, code_size: int) -> npt.NDArray[np.uint8]:
    return np.asarray(faiss.rev_swig_ptr(data, size * code_size).reshape(size, code_size))


def plan_kept_shards(folder: Location, entries: Sequence[ShardEntry], shards: int) -> tuple[ShardPlan, ...]:
    """Divide the kept passages of an index into shards whose sizes differ by at most one.

    Returns:
        Plans whose ranges count the kept passages of each old shard from 0.

    Raises:
        ValueError: there are fewer passages than shards.
    """
    total = sum(entry.kept for entry in entries)
    if total < shards:
        raise ValueError(f"--shards {shards}: there are only {total} passages; use fewer shards")
    starts = [0, *accumulate(entry.kept for entry in entries)]
    borders = [number * total // shards for number in range(shards + 1)]
    return tuple(
        ShardPlan(number, tuple(_cut(folder, entries, starts, first, last)))
        for number, (first, last) in enumerate(pairwise(borders))
    )


def _cut(
    folder: Location, entries: Sequence[ShardEntry], starts: Sequence[int], first: int, last: int
) -> Iterator[RowRange]:
    for entry, start in zip(entries, starts[:-1], strict=True):
        begin, end = max(first - start, 0), min(last - start, entry.kept)
        if begin < end:
            yield RowRange(folder / entry.passages_file, begin, end)


class ShardCompactor(ShardBuilder):
    """Builds shards of the passages that an index keeps, from its files.

    The passages of the plan's request are the index itself.
    """

    encodes = False

    def load_vectorizer(self) -> None:
        """Return nothing: the vectors exist."""

    @cached_property
    def old_entries(self) -> dict[str, ShardEntry]:
        """The entries of the index's shards, by the URI of their passages."""
        return {(self.source / entry.passages_file).uri: entry for entry in self.manifest.shards}

    @cached_property
    def source(self) -> Location:
        """The folder of the index."""
        return locate(self.plan.request.passages, self.plan.request.storage)

    @cached_property
    def manifest(self) -> IndexManifest:
        """The manifest of the index."""
        return read_manifest(self.source)

    def read_batches(self, shard: ShardPlan, index: Any) -> Iterator[tuple[pa.RecordBatch, Vectors]]:
        """Copy the vectors of a shard to its index, and yield its passages, whose vectors the index has then."""
        none, retrieval = np.empty((0, index.d), np.float32), RetrievalConfig(device="cpu", verify=False)
        for part in shard.ranges:
            old = Shard.open(self.source, self.old_entries[part.file.uri], self.manifest, retrieval)
            rows = old.list_rows()[part.start : part.stop]
            copy_vectors(old.index, index, rows)
            for first in range(0, len(rows), BATCH):
                for batch in old.passages.read_batches(rows[first : first + BATCH]):
                    self.tally.add.remote(batch.num_rows)
                    yield batch, none


def run_compaction(index: str, shards: int | None, actors: int | None, storage: StorageConfig) -> IndexManifest:
    """Fold an index and its updates into fresh shards, and write a new version of the manifest.

    Args:
        index: URI of the index.
        shards: number of shards; as many as are no updates by default.
        actors: number of actors, each of which holds an old and a fresh shard; 1 by default.
        storage: access to object storage.

    Raises:
        ValueError: there is no index, FAISS cannot copy its vectors, or there are fewer passages than shards.
        OutputInUseError: a build or an update is using the index.
        LeaseLostError: another one has taken over.
        ray.exceptions.RayError: a shard failed.
        StorageError: the storage cannot be read or written.
    """
    folder = locate(index, storage)
    with Lease(folder) as lease:
        manifest = read_manifest(folder)
        check_files(folder, manifest)
        number = number_next_update(folder, manifest)
        request = _request(folder, manifest, number, shards or len(manifest.shards) - manifest.added, actors, storage)
        built = run_build(_plan(request, manifest), BaseIndex(read_template(folder, manifest), None), ShardCompactor)
        # Which of the passages that the encoder read in part are left is not known.
        known = {"truncated_passages": None if manifest.truncated_passages else 0}
        fresh = [entry.below(name_update(number)).model_copy(update=known) for entry in built.manifest.shards]
        compacted = manifest.replace_shards(fresh, 0, number)
        lease.renew()
        publish_version(folder, manifest, compacted)
    return compacted


def _request(
    folder: Location, manifest: IndexManifest, number: int, shards: int, actors: int | None, storage: StorageConfig
) -> BuildRequest:
    if not supports_copying(create_empty_index(manifest.factory, manifest.dimension)):
        raise ValueError(f"{folder.uri}: the vectors of an index of {manifest.factory} cannot be copied; build it anew")
    encoder, update = manifest.encoder, folder / name_update(number)
    return BuildRequest(
        folder.uri, update.uri, encoder.name, encoder.style, get_form(manifest), manifest.factory, manifest.lexical,
        shards, actors=actors or 1, overwrite=True, storage=storage,
    )  # fmt: skip


def _plan(request: BuildRequest, manifest: IndexManifest) -> BuildPlan:
    folder, output = locate(request.passages, request.storage), locate(request.output, request.storage)
    files = [RowRange(folder / entry.passages_file, 0, entry.rows) for entry in manifest.shards]
    kept = plan_kept_shards(folder, manifest.shards, request.shards)
    return BuildPlan(request, files, kept, output, manifest.encoder, manifest.dimension, None, manifest.metadata)


def prune_index(index: str, storage: StorageConfig) -> tuple[int, int]:
    """Delete the files of earlier versions of an index; runs that began with one can no longer go on.

    No lease is needed, since no update writes these files again.

    Returns:
        Number of deleted files, and their bytes.

    Raises:
        ValueError: there is no index.
        StorageError: the storage cannot be read or written.
    """
    folder = locate(index, storage)
    manifest = read_manifest(folder)
    used = {MANIFEST, name_version(manifest.compute_digest())}
    used |= {name for entry in manifest.shards for name, _, _ in entry.list_files()}
    begun = name_update(manifest.updates + 1)
    base = f"{folder.path.rstrip('/')}/"
    names = {file.path.removeprefix(base): file for file in folder.list_files()}
    unused = [
        file
        for name, file in names.items()
        if INDEX_FILE.fullmatch(name) and name not in used and not (name.startswith("update-") and name >= begun)
    ]
    for file in unused:
        file.delete()
    return len(unused), sum(file.stamp.size for file in unused if file.stamp)
