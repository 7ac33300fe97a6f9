"""Check that an index is complete, and find the search parameters that reach a target recall@k."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.sections import RetrievalConfig, StorageConfig
from pipeline.decoding.prompts import format_passage
from pipeline.decoding.types import Passage
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
from pipeline.retrieval.index import Hit, PassageIndex
from pipeline.retrieval.manifest import check_encoder, check_files, choose_encoder, read_manifest
from pipeline.storage.location import locate
from pipeline.storage.parquet import list_parquet


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


def check_index_folder(request: CheckRequest) -> Checked:
    """Verify every file of an index, then measure recall, latency and throughput on a sample of queries.

    Raises:
        ValueError: there is no index, a file is damaged, the index has too few passages for k, or the queries or the
            encoder do not suit it.
        StorageError: the storage cannot be read.
    """
    folder, retrieval = locate(request.index, request.storage), request.retrieval
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    if manifest.passages <= request.k:
        raise ValueError(f"{folder.uri}: {manifest.passages} passages are too few to retrieve {request.k}")
    index = PassageIndex.open(folder, retrieval.model_copy(update={"verify": True, "device": "cpu"}))
    encoder = None
    if request.queries or (is_lossy(index) and manifest.embeddings is None):
        name, revision = choose_encoder(manifest, retrieval)
        encoder = Encoder.load(name, retrieval.device, revision, manifest.encoder.style)
        check_encoder(encoder, manifest)
    queries, own = _read_queries(request, index, encoder)
    exact, reference = _find_reference(request, index, queries, own, encoder)
    searches = [",".join(filter(None, (retrieval.search, swept))) for swept in list_parameters(index)]
    speeds = tuple(measure_search(index, queries, own, exact, search) for search in searches)
    enough = [speed.search for speed in speeds if speed.recall >= request.recall]
    return Checked(
        index=request.index,
        passages=manifest.passages,
        shards=len(manifest.shards),
        factory=manifest.factory,
        queries=len(queries),
        k=request.k,
        own=request.queries is None,
        reference=reference,
        speeds=speeds,
        wanted=request.recall,
        advice=enough[0] if enough else None,
        truncation=describe_truncation(manifest),
    )


def _read_queries(
    request: CheckRequest, index: PassageIndex, encoder: Encoder | None
) -> tuple[Vectors, list[Hit] | list[None]]:
    """Return the query vectors, and for each its own passage in the index, or None."""
    if request.queries is None or encoder is None:
        return sample_vectors(index, request.sample)
    texts: list[str] = []
    for file in list_parquet(locate(request.queries, request.storage)):
        with file.filesystem.open_input_file(file.path) as stream:
            if "query" not in (names := pq.read_schema(stream).names):
                raise ValueError(f"{file.uri}: column query is missing, found {', '.join(names)}")
            column = pq.read_table(stream, columns=["query"])["query"]
            texts += column.cast(pa.string()).drop_null().to_pylist()
    if not texts:
        raise ValueError(f"{request.queries}: contains no queries")
    chosen = np.unique(np.linspace(0, len(texts) - 1, min(request.sample, len(texts))).astype(int))
    vectors = encoder.encode_queries([texts[n] for n in chosen])
    return vectors, [None] * len(vectors)


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
