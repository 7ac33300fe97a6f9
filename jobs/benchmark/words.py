"""Compare the search by words, and the fused search, with bare bm25s and FAISS, side by side in one run.

``python -m jobs.benchmark.words --passages URI [--worded 1000000] [--json FILE]``

The passages are made of stretches of real ones, and have random vectors. One thread on both sides.

- Words: queries/s over the shards against one index of bm25s with its Numba scorer, and the agreement of scores.
- Fusion: queries/s against the sum of the times of bm25s and of one FAISS index of all vectors.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import bm25s
import faiss
import numpy as np
import pyarrow.parquet as pq
import ray
import typer

from jobs.benchmark.index import (
    Comparison,
    draw_all_vectors,
    draw_clustered,
    report_figures,
    time_build,
    time_call,
    write_first_passages,
    write_vectors,
)
from jobs.common import start_logging
from jobs.shell import run
from pipeline.config.sections import RetrievalConfig, StorageConfig
from pipeline.indexing.form import PassageForm
from pipeline.retrieval.fusion import FUSED_PLACES, QueryBatch, retrieve_fused
from pipeline.retrieval.hits import Hit
from pipeline.retrieval.index import PassageIndex
from pipeline.retrieval.words import WordForm, WordSplitter
from pipeline.storage.location import locate

BATCH, K = 64, 10
# Words of a stretch, stretches of a passage, and words of a query.
STRETCH, STRETCHES, ASKED = 20, 3, 10
# Dimension of the vectors: that of the demo encoder.
DIMENSION = 384
# Real passages that stretches are taken from.
SOURCES = 20_000
PARAMETERS = WordForm()


def draw_texts(source: Sequence[Sequence[str]], rows: int, seed: int) -> list[str]:
    """Return texts that consist of ``STRETCHES`` stretches of real ones, which are given as words."""
    rng = np.random.default_rng(seed)
    chosen = rng.integers(0, len(source), (rows, STRETCHES))
    starts = rng.random((rows, STRETCHES))
    return [
        " ".join(_cut(source[text], start, STRETCH) for text, start in zip(texts, places, strict=True))
        for texts, places in zip(chosen, starts, strict=True)
    ]


def _cut(words: Sequence[str], start: float, length: int) -> str:
    first = int(start * max(1, len(words) - length))
    return " ".join(words[first : first + length])


def index_bare(passages: Path) -> Any:
    """Index the words of passages with bm25s."""
    splitter, texts = WordSplitter(PARAMETERS), pq.read_table(passages, columns=["text"])["text"]
    # Interned, since 60 million separate strings would take 4 GB.
    words = [[sys.intern(word) for word in splitter.split(str(text))] for text in texts]
    model = bm25s.BM25(method="lucene", k1=PARAMETERS.k1, b=PARAMETERS.b, backend="numba")
    model.index(words, show_progress=False)
    return model


def search_bare(model: Any, queries: Sequence[Sequence[str]], k: int) -> Any:
    """Return the k best scores of each query by bm25s."""
    return model.retrieve(list(queries), k=k, show_progress=False, n_threads=1).scores


def compare_words(index: PassageIndex, model: Any, queries: Sequence[Sequence[str]], repeats: int) -> Comparison:
    """Compare the search by words over the shards with bm25s."""
    found, wanted = index.search_words(queries, K), search_bare(model, queries, K)  # also the warm-up of both
    ours, bare = [], []
    for _ in range(repeats):
        bare.append(len(queries) / time_call(lambda: search_bare(model, queries, K)))
        ours.append(len(queries) / time_call(lambda: index.search_words(queries, K)))
    same = np.mean([np.allclose(_list_scores(hits), row, rtol=1e-4) for hits, row in zip(found, wanted, strict=True)])
    note = f"{len(index.shards)} shards vs. one; same scores for {100 * same:.0f} % of queries"
    return Comparison("words: search", "queries/s", ours, bare, note)


def _list_scores(hits: Sequence[Hit]) -> list[float]:
    return [hit.score for hit in hits] + [0.0] * (K - len(hits))


def compare_fusion(
    index: PassageIndex, model: Any, flat: Any, batch: QueryBatch, retrieval: RetrievalConfig, repeats: int
) -> Comparison:
    """Compare the fused search with the sum of its two parts."""
    assert batch.words is not None
    words, wanted = batch.words, [K] * len(batch)
    retrieve_fused(index, batch, wanted, retrieval)
    flat.search(batch.vectors, FUSED_PLACES)  # warm-up
    ours, bare = [], []
    for _ in range(repeats):
        seconds = time_call(lambda: search_bare(model, words, FUSED_PLACES))
        seconds += time_call(lambda: flat.search(batch.vectors, FUSED_PLACES))
        bare.append(len(batch) / seconds)
        ours.append(len(batch) / time_call(lambda: retrieve_fused(index, batch, wanted, retrieval)))
    return Comparison("words and vectors (Flat): fused search", "queries/s", ours, bare, f"best {FUSED_PLACES} of each")


def benchmark_words(
    passages: Annotated[str, typer.Option(help="Real passages, as Parquet.")],
    worded: Annotated[int, typer.Option(min=1000, help="Number of passages to make of them.")] = 1_000_000,
    shards: Annotated[int, typer.Option(min=1)] = 4,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    scratch: Annotated[Path | None, typer.Option(help="Folder for temporary indexes.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures to this JSON file.")] = None,
) -> None:
    """Compare the search by words, and the fused search, with bare bm25s and FAISS."""
    start_logging()
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        folder = Path(name)
        real = [text.split() for text in write_first_passages(passages, SOURCES, folder / "real.parquet")]
        write_vectors(worded, DIMENSION, folder / "given", lambda rows, seed: draw_texts(real, rows, seed))
        form = PassageForm(embeddings="vector")
        time_build(folder / "given", folder / "index", form=form, shards=shards, lexical=PARAMETERS)
        ray.shutdown()
        retrieval = RetrievalConfig(device="cpu", fusion="rrf", verify=False)
        index = PassageIndex.open(locate(str(folder / "index"), StorageConfig()), retrieval)
        splitter = WordSplitter(PARAMETERS)
        asked = [splitter.split(text)[:ASKED] for text in draw_texts(real, BATCH, worded)]
        model, flat = index_bare(folder / "given"), faiss.IndexFlatIP(DIMENSION)
        flat.add(draw_all_vectors(worded, DIMENSION))
        faiss.omp_set_num_threads(1)
        batch = QueryBatch(draw_clustered(BATCH, DIMENSION, worded), asked)
        lines = [
            compare_words(index, model, asked, repeats),
            compare_fusion(index, model, flat, batch, retrieval, repeats),
        ]
    report_figures(lines, json_file, threads=1)


if __name__ == "__main__":
    run(benchmark_words)
