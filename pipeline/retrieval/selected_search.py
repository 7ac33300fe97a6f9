"""Searches a FAISS index for the best of some of its vectors."""

from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from pipeline.config.sections import RetrievalConfig
from pipeline.retrieval.encoder import Vectors
from pipeline.retrieval.filters import RowSelection, check_condition
from pipeline.retrieval.manifest import IndexManifest
from pipeline.retrieval.passage_columns import extend_schema
from pipeline.retrieval.shard_files import create_empty_index

# FAISS's type stubs lack the search parameters.
_faiss: Any = faiss


def check_selection(manifest: IndexManifest, retrieval: RetrievalConfig) -> None:
    """Check that an index can be searched with ``retrieval.filter``, if there is one, and without removed passages.

    Raises:
        FilterError: it is no condition on the passages of the index.
        ValueError: FAISS cannot restrict the search of the index, or not on the device.
    """
    if retrieval.filter is not None:
        check_condition(retrieval.filter, extend_schema(manifest.metadata))
    if not needs_selection(manifest, retrieval):
        return
    if retrieval.device == "gpu":
        raise ValueError(
            "retrieval.device=gpu: FAISS cannot leave out passages on GPUs, by retrieval.filter, by the column "
            "columns.filter, or since they were removed; set auto or cpu"
        )
    if not supports_selection(create_empty_index(manifest.factory, manifest.dimension)):
        raise ValueError(f"FAISS cannot filter the passages of an index of {manifest.factory}; use another factory")


def needs_selection(manifest: IndexManifest, retrieval: RetrievalConfig) -> bool:
    """Whether searches by vectors leave out passages, by a filter or since they were removed."""
    removed = any(shard.removed for shard in manifest.shards)
    return retrieval.searches_vectors and (removed or retrieval.filter is not None)


def supports_selection(index: Any) -> bool:
    """Whether FAISS can restrict the search of this kind of index: flat, scalar codes, inverted lists, or HNSW."""
    kind = _get_kind(index)
    if isinstance(kind, faiss.IndexPreTransform):
        return supports_selection(kind.index)
    if isinstance(kind, faiss.IndexHNSW):
        return supports_selection(kind.storage)
    if isinstance(kind, faiss.IndexIVFAdditiveQuantizer | _faiss.IndexIVFSpectralHash | _faiss.IndexIVFFlatDedup):
        return False  # the last one selects all equal vectors or none
    return isinstance(kind, faiss.IndexIVF | faiss.IndexFlat | faiss.IndexScalarQuantizer)


def search_selected(
    index: Any, queries: Vectors, width: int, selection: RowSelection, k: int | None = None
) -> tuple[Vectors, npt.NDArray[np.int64]]:
    """Search for the best of the selected vectors.

    Of the n vectors, m are selected. A search reads n / m times as many lists as usual, rounded, and thus compares as
    many vectors; its recall would fall with m otherwise. Where it finds fewer than k, it reads twice as many each time,
    up to all of them. Likewise for graphs, unless that is more work than to compare all selected vectors.

    Args:
        index: an index on the CPU that :func:`supports_selection` accepts, with its search parameters set.
        queries: float32 [n, dimension].
        width: number of vectors to return, if as many are found on the way to k.
        selection: the selected vectors.
        k: number of vectors to find, at most ``width``; this by default.

    Returns:
        Scores, float32, and rows, int64, both [n, width]; among the first k, the row is -1 only where fewer than k
        vectors are selected.
    """
    scores = np.full((len(queries), width), -np.inf, np.float32)
    rows = np.full((len(queries), width), -1, np.int64)
    needed = min(k or width, selection.count)
    unfinished = np.arange(len(queries) if selection.count else 0)
    effort = selection.rows / max(1, selection.count)
    while len(unfinished):
        found, exhausted = _search(index, queries[unfinished], width, selection, effort)
        scores[unfinished], rows[unfinished] = found
        if exhausted:
            break
        few = (rows[unfinished] >= 0).sum(axis=1) < needed
        unfinished, effort = unfinished[few], 2 * effort
    return scores, rows


def _search(
    index: Any, queries: Vectors, k: int, selection: RowSelection, effort: float
) -> tuple[tuple[Vectors, npt.NDArray[np.int64]], bool]:
    """Search with ``effort`` times the usual probes; also return whether more would find no others."""
    kind: Any = _get_kind(index)
    selector = selection.selector
    if isinstance(kind, faiss.IndexPreTransform):
        return _search(kind.index, _transform(kind, queries), k, selection, effort)
    if isinstance(kind, faiss.IndexIVF):
        probes = min(round(effort * kind.nprobe), kind.nlist)
        parameters = _faiss.SearchParametersIVF(sel=selector, nprobe=probes)
        return kind.search(queries, k, params=parameters), probes == kind.nlist
    if isinstance(kind, faiss.IndexHNSW):
        graph: Any = kind.hnsw
        breadth = round(effort * graph.efSearch)
        if breadth * graph.nb_neighbors(0) < selection.count:  # vectors that the walk compares, at most
            parameters = _faiss.SearchParametersHNSW(sel=selector, efSearch=breadth)
            return kind.search(queries, k, params=parameters), False
    parameters = _faiss.SearchParameters(sel=selector)
    vectors = _get_kind(kind.storage) if isinstance(kind, faiss.IndexHNSW) else kind
    return vectors.search(queries, k, params=parameters), True


def _transform(index: Any, queries: Vectors) -> Vectors:
    for number in range(index.chain.size()):
        queries = faiss.downcast_VectorTransform(index.chain.at(number)).apply(queries)
    return queries


def _get_kind(index: Any) -> Any:
    return faiss.downcast_index(index)
