"""What an index takes, before it is built: bytes by FAISS factory, worked out from FAISS's own structures."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import faiss

from pipeline.shards import empty_index

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
