"""Compute the size of an index before it is built, from FAISS's own structures, and the machines that it needs."""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import faiss

from pipeline.decoding.prompts import format_passage
from pipeline.indexing.form import PassageForm
from pipeline.indexing.passages import spread_samples
from pipeline.retrieval.encoder import Encoder
from pipeline.retrieval.faiss_device import RESERVED_BYTES, WORKING_BYTES, supports_gpu
from pipeline.retrieval.shard_files import create_empty_index
from pipeline.retrieval.words import WordForm, WordSplitter
from pipeline.storage.parquet import RowRange, map_in_threads, read_footer

FLOAT = 4
ID = 8
# Bytes that HNSW keeps for each vector: its level (4) and the offset of its links (8).
HNSW_FIXED = 12
# The factories that a plan compares by default; ``{lists}`` follows from the number of passages.
USUAL_FACTORIES = ("Flat", "SQ8", "HNSW32", "IVF{lists},Flat", "IVF{lists},SQ8", "OPQ64,IVF{lists},PQ64")


@dataclass(frozen=True)
class IndexSize:
    """The size of an index.

    Attributes:
        per_vector: bytes per vector: code, id and links.
        fixed: bytes of centroids, codebooks and rotation matrices.
    """

    per_vector: float
    fixed: int

    def compute_total(self, vectors: int) -> int:
        """Return the bytes of an index of this many vectors."""
        return round(self.per_vector * vectors) + self.fixed

    def __add__(self, other: "IndexSize") -> "IndexSize":
        return IndexSize(self.per_vector + other.per_vector, self.fixed + other.fixed)


def compute_index_size(factory: str, dimension: int) -> IndexSize:
    """Compute the size of an index from its factory string.

    Raises:
        ValueError: FAISS does not understand the string, or the size of this kind of index is not known here.
    """
    return _compute_size(create_empty_index(factory, dimension), factory)


def _compute_size(index: Any, factory: str) -> IndexSize:
    kind = faiss.downcast_index(index)  # a view: ``index`` owns the memory
    if isinstance(kind, faiss.IndexPreTransform):
        chain: Any = kind.chain  # a C++ vector; FAISS's type stubs are wrong here
        matrices = [faiss.downcast_VectorTransform(chain.at(n)) for n in range(chain.size())]
        return _compute_size(kind.index, factory) + IndexSize(0, sum(m.d_in * m.d_out * FLOAT for m in matrices))
    if isinstance(kind, faiss.IndexRefine):
        return _compute_size(kind.base_index, factory) + _compute_size(kind.refine_index, factory)
    if isinstance(kind, faiss.IndexIVF):
        return IndexSize(kind.code_size + ID, kind.nlist * kind.d * FLOAT + _count_codebook_bytes(kind))
    if isinstance(kind, faiss.IndexHNSW):
        return _compute_size(kind.storage, factory) + IndexSize(_compute_mean_links(kind.hnsw) * FLOAT + HNSW_FIXED, 0)
    if isinstance(kind, faiss.IndexFlatCodes):
        return IndexSize(kind.code_size, _count_codebook_bytes(kind))
    raise ValueError(
        f"factory {factory}: the size of a {type(kind).__name__} is not known; build a small index to measure it"
    )


def _count_codebook_bytes(index: Any) -> int:
    """Return the bytes of a product quantizer's codebook, 2^bits centroids per subquantizer; 0 for other indexes."""
    quantizer = getattr(index, "pq", None)
    return 0 if quantizer is None else int(quantizer.ksub * index.d * FLOAT)


def _compute_mean_links(hnsw: Any) -> float:
    """Return a vector's mean number of links: 2 M on the lowest level, M on each higher level that it reaches."""
    shares = faiss.vector_to_array(hnsw.assign_probas)
    links = faiss.vector_to_array(hnsw.cum_nneighbor_per_level)
    return float(sum(share * links[level + 1] for level, share in enumerate(shares)))


def choose_list_count(passages: int) -> int:
    """Return the usual number of inverted lists: 4 √n (FAISS recommends 4 to 16 √n), to the nearest power of two."""
    return int(2 ** max(4, round(math.log2(4 * passages**0.5))))


@dataclass(frozen=True)
class SizePlan:
    """The sizes of an index with one factory string.

    Attributes:
        factory: FAISS factory string.
        per_vector: bytes per passage.
        index: bytes of all shards.
        largest_shard: bytes of the largest shard.
    """

    factory: str
    per_vector: float
    index: int
    largest_shard: int


def plan_sizes(
    passages: int, dimension: int, shards: int, factories: Iterable[str] = USUAL_FACTORIES
) -> list[SizePlan]:
    """Compute the sizes of an index with several factory strings.

    Usual factories that FAISS does not support for this dimension are left out.

    Args:
        passages: number of passages in all shards.
        dimension: dimension of the vectors.
        shards: number of shards.
        factories: FAISS factory strings; ``{lists}`` is replaced by the usual number of inverted lists of a shard.

    Raises:
        ValueError: a factory string is not among the usual ones, and FAISS does not understand it or its size is not
            known.
    """
    largest = -(-passages // shards)
    plans = []
    for factory in factories:
        named = factory.format(lists=choose_list_count(largest))
        try:
            size = compute_index_size(named, dimension)
        except ValueError:
            if factory in USUAL_FACTORIES:
                continue  # FAISS does not support it for this dimension
            raise
        all_shards = size.compute_total(passages) + (shards - 1) * size.fixed
        plans.append(SizePlan(named, size.per_vector, all_shards, size.compute_total(largest)))
    return plans


@dataclass(frozen=True)
class SearchCost:
    """The cost of one query.

    Attributes:
        compared: number of vectors compared with the query.
        bytes: bytes read for these comparisons.
    """

    compared: int
    bytes: int


def estimate_search_cost(
    factory: str, dimension: int, vectors: int, nprobe: int = 32, ef_search: int = 64
) -> SearchCost:
    """Estimate the cost of a query in one shard.

    Flat indexes compare all vectors; inverted lists compare all centroids and the vectors of ``nprobe`` lists, assumed
    to be equally long; graphs compare at most the neighbors of ``ef_search`` vectors on the lowest level.

    Args:
        factory: FAISS factory string.
        dimension: dimension of the vectors.
        vectors: number of vectors in the shard.
        nprobe: inverted lists searched for each query.
        ef_search: candidates that a graph search keeps.

    Raises:
        ValueError: FAISS does not understand the string, or the size of this kind of index is not known here.
    """
    size = compute_index_size(factory, dimension)
    index = create_empty_index(factory, dimension)
    if (ivf := faiss.try_extract_index_ivf(index)) is not None:
        scanned = round(vectors * min(1.0, nprobe / ivf.nlist))
        return SearchCost(ivf.nlist + scanned, ivf.nlist * ivf.d * FLOAT + round(scanned * size.per_vector))
    graph: Any = faiss.downcast_index(index)
    on_graph = isinstance(graph, faiss.IndexHNSW)
    compared = min(vectors, ef_search * graph.hnsw.nb_neighbors(0)) if on_graph else vectors
    return SearchCost(compared, round(compared * size.per_vector))


# A 7B model with the architecture of Llama 2: 6.74 · 10^9 parameters in half precision, 32 layers, hidden size 4,096.
MODEL_BYTES = 13_480_000_000
KV_BYTES_PER_TOKEN = 2 * 32 * 4096 * 2
# KV cache for about eight concurrent rows of five passages each.
KV_TOKENS = 8192
# vLLM's activations and CUDA graphs.
ENGINE_BYTES = 1_500_000_000
# The encoder (512 MiB), the reserve and FAISS's working memory.
BESIDE_BYTES = (512 << 20) + RESERVED_BYTES + WORKING_BYTES
CARDS = (24_000_000_000, 40_000_000_000, 80_000_000_000)
# Share of a machine's memory for shards; the rest is for the system, Ray and passages.
MEMORY_SHARE = 0.8


def find_gpu_setting(factory: str, dimension: int) -> str:
    """Return the setting with which GPUs can search an index.

    Returns:
        An empty string if none is needed, ``float16`` if ``retrieval.float16`` is, and ``none`` if GPUs cannot search
        this kind of index.
    """
    index = create_empty_index(factory, dimension)
    if supports_gpu(index, float16=False):
        return ""
    return "float16" if supports_gpu(index, float16=True) else "none"


def compute_room_beside_7b(card: int) -> int:
    """Return the bytes of a GPU of ``card`` bytes that are left for an index beside a 7B model in half precision."""
    engine = MODEL_BYTES + KV_TOKENS * KV_BYTES_PER_TOKEN + ENGINE_BYTES
    return max(0, card - engine - BESIDE_BYTES)


def compute_share_beside(index: int, card: int) -> float:
    """Return the ``gpu_memory_utilization`` that leaves room for an index on a GPU, rounded down to 1 %.

    Args:
        index: bytes of the index.
        card: bytes of the GPU.
    """
    return math.floor(100 * (card - index - BESIDE_BYTES) / card) / 100


def count_cards(index: int, card: int) -> int:
    """Return the number of GPUs, without a model on them, whose shard servers together hold an index.

    Args:
        index: bytes of the index.
        card: bytes of each GPU.
    """
    return -(-index // (card - BESIDE_BYTES))


def count_machines(index: int, memory: int) -> int:
    """Return the number of machines that together hold an index in CPU memory.

    Args:
        index: bytes of the index.
        memory: bytes of memory of each machine.
    """
    return -(-index // int(memory * MEMORY_SHARE))


# Passages encoded to measure the throughput of this machine: a few seconds on a CPU.
SAMPLE = 64
# Row (int32) and score (float32) of a passage that has a word.
POSTING_BYTES = 8


@dataclass(frozen=True)
class Corpus:
    """The properties of a corpus that decide the size and the build time of its index.

    Attributes:
        passages: number of passages; estimated from a sample if they are split.
        text_bytes: uncompressed bytes of ids, titles and texts: the size of the index's passage files.
        dimension: dimension of the encoder's vectors.
        rate: throughput of one encoder on this machine, in passages per second.
        truncated: share of passages of which the encoder would read only the beginning, in a sample.
        max_tokens: number of tokens that the encoder reads of a passage; None is no limit.
        words: mean number of different words of a passage, in a sample.
    """

    passages: int
    text_bytes: int
    dimension: int
    rate: float
    truncated: float
    max_tokens: int | None
    words: float

    @property
    def lexical_bytes(self) -> int:
        """Bytes of the lexical part of the index, without its list of words: a row and a score for each occurrence."""
        return round(self.passages * self.words * POSTING_BYTES)


def survey_corpus(files: list[RowRange], form: PassageForm, encoder: Encoder, batch_size: int) -> Corpus:
    """Count passages and bytes from the footers, and measure lengths and the encoder's throughput on a sample."""
    samples = spread_samples(files, SAMPLE)
    batches = [batch.passages for sample in samples for batch in sample.read(form)]
    texts = [format_passage(row["title"], row["text"]) for batch in batches for row in batch.to_pylist()]
    parts = len(texts) / sum(len(sample.rows) for sample in samples)
    return Corpus(
        passages=round(parts * sum(file.rows for file in files)),
        text_bytes=sum(map_in_threads(lambda part: _count_text_bytes(part, form), files)),
        dimension=encoder.dimension,
        rate=_measure_rate(encoder, texts[:: -(-len(texts) // SAMPLE)], batch_size),
        truncated=encoder.count_truncated(texts) / len(texts),
        max_tokens=encoder.max_tokens,
        words=sum(len(set(WordSplitter(WordForm()).split(text))) for text in texts) / len(texts),
    )


def _measure_rate(encoder: Encoder, texts: list[str], batch_size: int) -> float:
    encoder.encode(texts[:batch_size], batch_size)  # warm-up
    begun = time.monotonic()
    encoder.encode(texts, batch_size)
    return len(texts) / (time.monotonic() - begun)


def _count_text_bytes(part: RowRange, form: PassageForm) -> int:
    footer, total, read = read_footer(part.file), 0, form.list_columns()
    for group in range(footer.num_row_groups):
        columns = [footer.row_group(group).column(n) for n in range(footer.num_columns)]
        total += sum(c.total_uncompressed_size for c in columns if c.path_in_schema in read)
    return total
