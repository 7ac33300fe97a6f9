"""Small indexes made of random vectors."""

from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa

from pipeline.config.sections import RetrievalConfig, StorageConfig
from pipeline.decoding.types import RetrievedPassage
from pipeline.retrieval.encoder import Vectors
from pipeline.retrieval.fusion import QueryBatch, SearchableIndex, retrieve_fused
from pipeline.retrieval.manifest import EncoderEntry, IndexManifest, write_manifest
from pipeline.retrieval.passage_columns import PASSAGE_SCHEMA
from pipeline.retrieval.shard_files import build_shard, create_empty_index, train_index
from pipeline.storage.location import Location, locate

CPU = RetrievalConfig(device="cpu")
ENCODER = EncoderEntry(name="tiny", revision=None, digest="d" * 64)


def passages(start: int, rows: int) -> pa.RecordBatch:
    names = [str(row) for row in range(start, start + rows)]
    return pa.record_batch([names, [f"title {n}" for n in names], [f"text {n}" for n in names]], schema=PASSAGE_SCHEMA)


def save(folder: Location, parts: list[Vectors], factory: str = "Flat") -> IndexManifest:
    """An index whose passage ids are row numbers over all shards; shards are written in batches of 7 rows."""
    dimension = parts[0].shape[1]
    template = create_empty_index(factory, dimension)
    if not template.is_trained:
        train_index(template, np.concatenate(parts))
    entries, start = [], 0
    for number, part in enumerate(parts):
        begins = range(0, len(part), 7)
        batches = [(passages(start + i, len(part[i : i + 7])), part[i : i + 7]) for i in begins]
        entries.append(build_shard(folder, number, faiss.clone_index(template), batches))
        start += len(part)
    manifest = IndexManifest(
        encoder=ENCODER, dimension=dimension, factory=factory, passages=start, shards=tuple(entries)
    )
    write_manifest(folder, manifest)
    return manifest


def unit_vectors(rows: int, seed: int = 0, dimension: int = 16) -> Vectors:
    vectors = np.random.default_rng(seed).normal(size=(rows, dimension)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def retrieve(index: SearchableIndex, queries: Vectors, k: int) -> list[list[RetrievedPassage]]:
    """Passages found by vectors alone."""
    return retrieve_fused(index, QueryBatch(queries), [k] * len(queries), CPU)


def place(path: Path) -> Location:
    """A local path as a location."""
    return locate(str(path), StorageConfig())


def numbered(rows: int, start: int = 0) -> dict[str, list[str]]:
    """Columns of so many passages, numbered from ``start``."""
    names = [str(row) for row in range(start, start + rows)]
    return {"id": names, "title": [f"title {n}" for n in names], "text": [f"text {n}" for n in names]}
