"""Check that an index is complete, find the search parameters that reach a target recall@k, and try the reranker."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.config.sections import RetrievalConfig, StorageConfig
from pipeline.decoding.prompts import format_passage
from pipeline.decoding.types import Passage
from pipeline.indexing.gold_recall import GoldQueries, GoldRecall, measure_gold_recall
from pipeline.indexing.parts import describe_truncation
from pipeline.indexing.recall import (
    CANDIDATES,
    Speed,
    drop_own_passages,
    is_lossy,
    list_parameters,
    measure_search,
    rerank,
    sample_vectors,
    search_exhaustively,
)
from pipeline.retrieval.encoder import Encoder, Vectors
from pipeline.retrieval.fusion import QueryBatch
from pipeline.retrieval.hits import Hit
from pipeline.retrieval.index import PassageIndex
from pipeline.retrieval.manifest import check_encoder, check_files, check_words, choose_encoder, read_manifest
from pipeline.retrieval.reranker import Reranker, find_reranker
from pipeline.retrieval.words import WordSplitter
from pipeline.storage.location import locate
from pipeline.storage.parquet import list_parquet

log = logging.getLogger(__name__)

GOLD = "gold_passage_id"


@dataclass(frozen=True)
class CheckRequest:
    """The arguments of a check.

    Attributes:
        index: URI of the index.
        storage: access to object storage.
        retrieval: section ``retrieval`` of the configuration.
        queries: URI of a query set; None searches for passages of the index.
        sample: maximum number of queries.
        k: passages retrieved for each query.
        recall: target recall@k.
    """

    index: str
    storage: StorageConfig
    retrieval: RetrievalConfig
    queries: str | None = None
    sample: int = 200
    k: int = 10
    recall: float = 0.95


@dataclass(frozen=True)
class Checked:
    """The result of a check.

    Attributes:
        index: URI of the index.
        passages: number of passages.
        shards: number of shards.
        factory: FAISS factory string.
        queries: number of queries.
        k: passages retrieved for each query.
        own: whether the queries are passages of the index.
        reference: description of the result that recall is measured against.
        speeds: measurement for each search parameter, fastest parameter first.
        wanted: target recall@k.
        advice: fastest search parameter that reaches the target; None if no parameter reaches it.
        truncation: line about the passages of which the encoder read only the beginning; None if there are none.
        gold: recall of the gold passages for each way to search; empty if no query has one.
        golds: number of queries with a gold passage.
    """

    index: str
    passages: int
    shards: int
    factory: str
    queries: int
    k: int
    own: bool
    reference: str
    speeds: tuple[Speed, ...]
    wanted: float
    advice: str | None
    truncation: str | None
    gold: tuple[GoldRecall, ...] = ()
    golds: int = 0


@dataclass(frozen=True)
class Probe:
    """The queries of a check.

    Attributes:
        vectors: query vectors, float32 [n, dimension].
        own: passage from which each query was made; None for the queries of a query set.
        texts: the queries; empty if they are passages of the index.
        golds: ids of their gold passages, where they have one; empty if they are passages of the index.
    """

    vectors: Vectors
    own: list[Hit] | list[None]
    texts: Sequence[str] = ()
    golds: Sequence[str | None] = ()


def check_index_folder(request: CheckRequest) -> Checked:
    """Verify every file of an index, then measure recall, latency and throughput on a sample of queries.

    Raises:
        ValueError: there is no index, a file is damaged, the index has too few passages for k, or the queries or the
            encoder do not suit it.
        StorageError: the storage cannot be read.
    """
    folder, retrieval = locate(request.index, request.storage), request.retrieval
    if retrieval.rerank.model:
        find_reranker(retrieval.rerank)
    manifest = read_manifest(folder)
    check_words(folder, manifest, retrieval)
    check_files(folder, manifest)
    if retrieval.filter is not None:
        raise ValueError("retrieval.filter: the search is measured without filters; leave it out")
    if manifest.passages <= request.k:
        raise ValueError(f"{folder.uri}: {manifest.passages} passages are too few to retrieve {request.k}")
    everything = {"verify": True, "device": "cpu", "fusion": "rrf" if manifest.lexical else "dense"}
    index = PassageIndex.open(folder, retrieval.model_copy(update=everything))
    encoder = None
    if request.queries or (is_lossy(index) and manifest.embeddings is None):
        name, revision = choose_encoder(manifest, retrieval)
        encoder = Encoder.load(name, retrieval.device, revision, manifest.encoder.style)
        check_encoder(encoder, manifest)
    probe = _read_probe(request, index, encoder)
    gold = _find_gold(request, index, probe)
    exact, reference = _find_reference(request, index, probe.vectors, probe.own, encoder)
    searches = [",".join(filter(None, (retrieval.search, swept))) for swept in list_parameters(index)]
    speeds = tuple(measure_search(index, probe.vectors, probe.own, exact, search) for search in searches)
    enough = [speed.search for speed in speeds if speed.recall >= request.recall]
    return Checked(
        index=request.index,
        passages=manifest.passages,
        shards=len(manifest.shards),
        factory=manifest.factory,
        queries=len(probe.vectors),
        k=request.k,
        own=request.queries is None,
        reference=reference,
        speeds=speeds,
        wanted=request.recall,
        advice=enough[0] if enough else None,
        truncation=describe_truncation(manifest),
        gold=gold,
        golds=sum(gold is not None for gold in probe.golds),
    )


def _find_gold(request: CheckRequest, index: PassageIndex, probe: Probe) -> tuple[GoldRecall, ...]:
    """Measure the recall of the gold passages, with the search parameters of the configuration and its reranker."""
    rows = [row for row, gold in enumerate(probe.golds) if gold is not None]
    rerank = request.retrieval.rerank.model
    if not rows:
        if rerank:
            log.warning("retrieval.rerank is not measured: this takes --queries with the column %s", GOLD)
        return ()
    texts = [probe.texts[row] for row in rows]
    words = None
    if index.manifest.lexical is not None:
        splitter = WordSplitter(index.manifest.lexical)
        words = [splitter.split(text) for text in texts]
    golds = [gold for gold in probe.golds if gold is not None]
    queries = GoldQueries(texts, golds, QueryBatch(probe.vectors[rows], words))
    reranker = Reranker.load(request.retrieval) if rerank else None
    return measure_gold_recall(index, queries, request.k, request.retrieval, reranker)


def _read_probe(request: CheckRequest, index: PassageIndex, encoder: Encoder | None) -> Probe:
    """Read a sample of the query set, or of the passages of the index."""
    if request.queries is None or encoder is None:
        return Probe(*sample_vectors(index, request.sample))
    parts: list[pa.Table] = []
    for file in list_parquet(locate(request.queries, request.storage)):
        with file.filesystem.open_input_file(file.path) as stream:
            if "query" not in (names := pq.read_schema(stream).names):
                raise ValueError(f"{file.uri}: column query is missing, found {', '.join(names)}")
            read = pq.read_table(stream, columns=[name for name in ("query", GOLD) if name in names])
            columns = [_read_texts(file.uri, read, name) for name in ("query", GOLD)]
            parts.append(pa.table(columns, ["query", GOLD]).filter(pc.is_valid(columns[0])))
    rows = pa.concat_tables(parts).to_pylist() if parts else []
    if not rows:
        raise ValueError(f"{request.queries}: contains no queries")
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(request.sample, len(rows))).astype(int))
    texts, golds = ([rows[n][name] for n in chosen] for name in ("query", GOLD))
    return Probe(encoder.encode_queries(texts), [None] * len(texts), texts, golds)


def _read_texts(uri: str, table: pa.Table, name: str) -> pa.ChunkedArray:
    """Return a column as strings; nulls if there is no such column.

    Raises:
        ValueError: its values are not texts.
    """
    if name not in table.column_names:
        return pa.chunked_array([pa.nulls(len(table), pa.string())])
    try:
        return table[name].cast(pa.string())
    except pa.ArrowException:
        raise ValueError(f"{uri}: column {name} is of the type {table[name].type}, expected string") from None


def _find_reference(
    request: CheckRequest,
    index: PassageIndex,
    queries: Vectors,
    own: list[Hit] | list[None],
    encoder: Encoder | None,
) -> tuple[list[list[Hit]], str]:
    """Return the reference top k of each query, and a description of how it was found."""
    k = request.k
    if not is_lossy(index):
        return drop_own_passages(search_exhaustively(index, queries, k + 1), own, k), "exact search over all vectors"
    if encoder is None:
        words = "exhaustive search over the codes; quantization loss is not measured, as the index has no other vectors"
        return drop_own_passages(search_exhaustively(index, queries, k + 1), own, k), words
    candidates = drop_own_passages(search_exhaustively(index, queries, CANDIDATES * k + 1), own, CANDIDATES * k)

    def read_passage(hit: Hit) -> Passage:
        return index.shards[hit.shard].passages.read_passage(hit.row)

    def encode(passages: list[Passage]) -> Vectors:
        return encoder.encode([format_passage(p.title, p.text) for p in passages])

    words = f"the {CANDIDATES * k} best codes of each query, reranked by exact vectors"
    return rerank(candidates, queries, k, read_passage, encode), words
