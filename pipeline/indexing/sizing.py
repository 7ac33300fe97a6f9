"""What an index takes, before it is built: bytes by FAISS factory, worked out from FAISS's own structures."""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import faiss

from pipeline.decoding.prompts import passage_text
from pipeline.indexing.passages import spread_samples
from pipeline.retrieval.encoder import Encoder
from pipeline.retrieval.faiss_device import RESERVED_BYTES, WORKING_BYTES, gpu_form
from pipeline.retrieval.shard_files import PASSAGE_SCHEMA, empty_index
from pipeline.storage.parquet import RowRange, map_in_threads, read_footer

FLOAT = 4
ID = 8
# HNSW keeps for each vector its level (4) and where its links begin (8).
HNSW_FIXED = 12
# What plans show side by side; list counts follow the number of passages.
USUAL_FACTORIES = ("Flat", "SQ8", "HNSW32", "IVF{lists},Flat", "IVF{lists},SQ8", "OPQ64,IVF{lists},PQ64")


@dataclass(frozen=True)
class IndexSize:
    """Bytes of an index.

    Attributes:
        per_vector: for each vector: code, id and links.
        fixed: centroids, codebooks and rotation matrices.
    """

    per_vector: float
    fixed: int

    def total(self, vectors: int) -> int:
        """Bytes for so many vectors."""
        return round(self.per_vector * vectors) + self.fixed

    def __add__(self, other: "IndexSize") -> "IndexSize":
        return IndexSize(self.per_vector + other.per_vector, self.fixed + other.fixed)


def index_size(factory: str, dimension: int) -> IndexSize:
    """The size of an index by its factory string.

    Raises:
        ValueError: FAISS does not understand the string, or it is of a kind whose size is not known here.
    """
    return _size(empty_index(factory, dimension), factory)


def _size(index: Any, factory: str) -> IndexSize:
    kind = faiss.downcast_index(index)  # a view: ``index`` stays the owner
    if isinstance(kind, faiss.IndexPreTransform):
        chain: Any = kind.chain  # a C++ vector, whatever the stubs say
        matrices = [faiss.downcast_VectorTransform(chain.at(n)) for n in range(chain.size())]
        return _size(kind.index, factory) + IndexSize(0, sum(m.d_in * m.d_out * FLOAT for m in matrices))
    if isinstance(kind, faiss.IndexRefine):
        return _size(kind.base_index, factory) + _size(kind.refine_index, factory)
    if isinstance(kind, faiss.IndexIVF):
        return IndexSize(kind.code_size + ID, kind.nlist * kind.d * FLOAT + _codebook(kind))
    if isinstance(kind, faiss.IndexHNSW):
        return _size(kind.storage, factory) + IndexSize(_links(kind.hnsw) * FLOAT + HNSW_FIXED, 0)
    if isinstance(kind, faiss.IndexFlatCodes):
        return IndexSize(kind.code_size, _codebook(kind))
    raise ValueError(f"factory {factory}: the size of a {type(kind).__name__} is not known; build a small one to see")


def _codebook(index: Any) -> int:
    """Product quantisers hold 2^bits centroids for each part of a vector."""
    quantiser = getattr(index, "pq", None)
    return 0 if quantiser is None else int(quantiser.ksub * index.d * FLOAT)


def _links(hnsw: Any) -> float:
    """Links that a vector has on average: twice M below, M on each level above that it reaches."""
    shares = faiss.vector_to_array(hnsw.assign_probas)
    links = faiss.vector_to_array(hnsw.cum_nneighbor_per_level)
    return float(sum(share * links[level + 1] for level, share in enumerate(shares)))


def usual_lists(passages: int) -> int:
    """Inverted lists for so many passages: about 4 √n (FAISS says 4 to 16 √n), to the nearest power of two."""
    return int(2 ** max(4, round(math.log2(4 * passages**0.5))))


@dataclass(frozen=True)
class SizePlan:
    """One line of a plan: bytes of all shards together, of one, and for each passage."""

    factory: str
    per_vector: float
    index: int
    largest_shard: int


def size_plan(passages: int, dimension: int, shards: int, factories: Iterable[str] = USUAL_FACTORIES) -> list[SizePlan]:
    """Sizes for several factories; ``{lists}`` in one stands for the usual number of inverted lists of a shard.

    Args:
        passages: in all shards.

    Raises:
        ValueError: FAISS does not understand one that is not among the usual ones.
    """
    largest = -(-passages // shards)
    lines = []
    for factory in factories:
        named = factory.format(lists=usual_lists(largest))
        try:
            size = index_size(named, dimension)
        except ValueError:
            if factory in USUAL_FACTORIES:
                continue  # not for this dimension
            raise
        lines.append(
            SizePlan(named, size.per_vector, size.total(passages) + (shards - 1) * size.fixed, size.total(largest))
        )
    return lines


@dataclass(frozen=True)
class SearchCost:
    """What one query costs: vectors compared with it, and bytes read for that."""

    compared: int
    bytes: int


def search_cost(factory: str, dimension: int, vectors: int, nprobe: int = 32, ef_search: int = 64) -> SearchCost:
    """The cost of a query in one shard of so many vectors.

    Flat indexes compare all; inverted lists their centroids and ``nprobe`` of equally long lists; graphs at most
    ``ef_search`` vectors' links on the lowest level.

    Raises:
        ValueError: as :func:`index_size`.
    """
    size = index_size(factory, dimension)
    index = empty_index(factory, dimension)
    if (ivf := faiss.try_extract_index_ivf(index)) is not None:
        scanned = round(vectors * min(1.0, nprobe / ivf.nlist))
        return SearchCost(ivf.nlist + scanned, ivf.nlist * ivf.d * FLOAT + round(scanned * size.per_vector))
    graph: Any = faiss.downcast_index(index)
    on_graph = isinstance(graph, faiss.IndexHNSW)
    compared = min(vectors, ef_search * graph.hnsw.nb_neighbors(0)) if on_graph else vectors
    return SearchCost(compared, round(compared * size.per_vector))


# A 7B model of Llama 2's shape: 6.74 · 10^9 parameters in half precision; keys and values of 32 layers, 4,096 wide.
MODEL_BYTES = 13_480_000_000
KV_BYTES_PER_TOKEN = 2 * 32 * 4096 * 2
# Enough for some eight rows of five passages at once; vLLM's activations and graphs.
KV_TOKENS = 8192
ENGINE_BYTES = 1_500_000_000
# The encoder, and what is kept free and for FAISS's working memory.
BESIDE_BYTES = (512 << 20) + RESERVED_BYTES + WORKING_BYTES
CARDS = (24_000_000_000, 40_000_000_000, 80_000_000_000)
# Of a machine's memory, shards may take this share: the rest is for the system, Ray and passages.
MEMORY_SHARE = 0.8


def gpu_need(factory: str, dimension: int) -> str:
    """What GPUs ask of an index: nothing, ``float16`` (``retrieval.float16``), or ``none`` where they have no such."""
    index = empty_index(factory, dimension)
    return "" if gpu_form(index, False) else "float16" if gpu_form(index, True) else "none"


def beside_7b(card: int) -> int:
    """Bytes of a card that an index may take beside a 7B model in half precision."""
    engine = MODEL_BYTES + KV_TOKENS * KV_BYTES_PER_TOKEN + ENGINE_BYTES
    return max(0, card - engine - BESIDE_BYTES)


def share_beside(index: int, card: int) -> float:
    """``gpu_memory_utilization`` that leaves room for an index of so many bytes on a card, rounded down to 1 %."""
    return math.floor(100 * (card - index - BESIDE_BYTES) / card) / 100


def cards_needed(index: int, card: int) -> int:
    """Cards of shard servers, without a model on them, that hold an index together."""
    return -(-index // (card - BESIDE_BYTES))


def machines_needed(index: int, memory: int) -> int:
    """Machines of so many bytes of memory that hold an index together, in CPU memory."""
    return -(-index // int(memory * MEMORY_SHARE))


# Encoded to see how fast this machine is: a few seconds on a CPU.
SAMPLE = 64


@dataclass(frozen=True)
class Corpus:
    """What the passages' files say.

    Attributes:
        text_bytes: of ids, titles and texts, uncompressed: what the passages files will have.
        rate: passages per second of one encoder on this machine.
    """

    passages: int
    text_bytes: int
    dimension: int
    rate: float


def survey(files: list[RowRange], encoder: Encoder, batch_size: int) -> Corpus:
    """Read the footers, and encode a sample."""
    batches = [batch.passages for sample in spread_samples(files, SAMPLE) for batch in sample.read()]
    texts = [passage_text(row["title"], row["text"]) for batch in batches for row in batch.to_pylist()]
    encoder.encode(texts[:batch_size], batch_size)  # the first batch warms up
    begun = time.monotonic()
    encoder.encode(texts, batch_size)
    rate = len(texts) / (time.monotonic() - begun)
    return Corpus(sum(file.rows for file in files), sum(map_in_threads(_text_bytes, files)), encoder.dimension, rate)


def _text_bytes(part: RowRange) -> int:
    footer, total = read_footer(part.file), 0
    for group in range(footer.num_row_groups):
        columns = [footer.row_group(group).column(n) for n in range(footer.num_columns)]
        total += sum(c.total_uncompressed_size for c in columns if c.path_in_schema in PASSAGE_SCHEMA.names)
    return total
