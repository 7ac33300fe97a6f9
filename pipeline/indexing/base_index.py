"""Reads from an index what shards that are added to it begin with."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.indexing.form import PassageForm
from pipeline.indexing.postings import WordStatistics, merge_statistics
from pipeline.retrieval.index_cache import SCRATCH_PREFIX
from pipeline.retrieval.lexical import POSTINGS_SCHEMA
from pipeline.retrieval.manifest import IndexManifest, ShardEntry
from pipeline.retrieval.passage_columns import PASSAGE_SCHEMA
from pipeline.retrieval.shard_files import create_empty_index, read_removed_rows
from pipeline.storage.location import Location


@dataclass(frozen=True)
class BaseIndex:
    """The index that new shards are added to.

    Attributes:
        template: its empty FAISS index, trained.
        statistics: words of its passages; None without a lexical part.
    """

    template: Any
    statistics: WordStatistics | None


def get_form(manifest: IndexManifest) -> PassageForm:
    """Return the form in which the passages of an index were read."""
    return PassageForm(manifest.columns, manifest.embeddings, manifest.max_words, tuple(manifest.metadata))


def read_template(folder: Location, manifest: IndexManifest) -> Any:
    """Return the empty index that all shards began with, from the smallest of them if it was trained.

    Raises:
        StorageError: the shard cannot be read.
    """
    empty = create_empty_index(manifest.factory, manifest.dimension)
    if empty.is_trained:
        return empty
    smallest = min(manifest.shards, key=lambda entry: entry.bytes)
    index = faiss.deserialize_index(np.frombuffer((folder / smallest.file).read(), np.uint8))
    index.reset()
    return index


def read_passage_ids(folder: Location, entry: ShardEntry) -> pa.Array:
    """Read the ids of the passages of a shard, and no other column."""
    table = _read_columns(folder / entry.passages_file, PASSAGE_SCHEMA.names.index("id"))
    return table["id"].combine_chunks()


def read_removed(folder: Location, entry: ShardEntry) -> npt.NDArray[np.int64]:
    """Read the rows of the removed passages of a shard: int64 [rows], ascending."""
    if entry.removed is None:
        return np.empty(0, np.int64)
    file = folder / entry.removed.file
    return read_removed_rows(pa.BufferReader(file.read()), file.uri)


def read_corpus_statistics(folder: Location, manifest: IndexManifest) -> WordStatistics:
    """Add up the words of the shards that no update has added: all scores are computed with these."""
    first = manifest.shards[: len(manifest.shards) - manifest.added]
    return merge_statistics(_read_statistics(folder, entry) for entry in first)


def _read_statistics(folder: Location, entry: ShardEntry) -> WordStatistics:
    assert entry.lexical is not None, "all shards of an index have a lexical part, or none"
    names = POSTINGS_SCHEMA.names
    table = _read_columns(folder / entry.lexical.file, names.index("words"), names.index("starts"))
    words, starts = (table[name].combine_chunks().values for name in ("words", "starts"))
    passages = pa.array(np.diff(starts.to_numpy()))
    return WordStatistics(entry.rows, entry.lexical.words, pa.table({"word": words, "passages": passages}))


def _read_columns(file: Location, *columns: int) -> pa.Table:
    """Read some columns of an Arrow IPC file, given by their positions.

    A remote file is fetched whole: it has many small batches, each of which would take requests of its own.
    """
    options = pa.ipc.IpcReadOptions(included_fields=list(columns))
    with tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX) as scratch:
        copy = Path(file.path) if file.local else Path(scratch) / file.name
        if not file.local:
            file.fetch(copy)
        return pa.ipc.open_file(pa.memory_map(str(copy)), options=options).read_all()
