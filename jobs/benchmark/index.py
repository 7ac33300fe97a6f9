"""Compare the index with its bare parts, encoder, FAISS and reranker, side by side in one run.

``python -m jobs.benchmark.index --passages URI [--encoded 2000] [--reranked 16] [--vectors 2000000] [--json FILE]``

- Build: passages/s of the build against the same encoder in a bare loop over the same texts.
- Given vectors: vectors/s of the build against ``faiss.add`` of vectors that are in memory already.
- Search: queries/s over the shards in batches of 64 against one FAISS index of all vectors, and the agreement of hits.
- Filters: queries/s of the same search restricted to a half and to a hundredth of the vectors, against all of them.
- Reranking: pairs/s of concurrent queries against the same cross-encoder with all pairs at once.
- Memory: peak memory of a builder against the size of a shard.
"""

import asyncio
import dataclasses
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import typer
from rich.console import Console
from rich.table import Table
from sentence_transformers import CrossEncoder

from jobs.common import start_logging
from jobs.shell import run
from pipeline.config.sections import RerankConfig, RetrievalConfig, StorageConfig
from pipeline.decoding.prompts import format_passage
from pipeline.decoding.types import Passage, RetrievedPassage
from pipeline.indexing.build import BuildRequest, check_build
from pipeline.indexing.build_pool import Built, run_build
from pipeline.indexing.form import PassageForm
from pipeline.indexing.passages import find_passages, read_passages
from pipeline.retrieval.batching import Batcher
from pipeline.retrieval.encoder import Encoder, Vectors
from pipeline.retrieval.faiss_device import set_search
from pipeline.retrieval.hits import Hit
from pipeline.retrieval.index import PassageIndex
from pipeline.retrieval.reranker import Reranker, find_reranker
from pipeline.storage.location import locate

FILE_ROWS = 250_000
BATCH, K = 64, 10
# A half and a hundredth of the synthetic vectors.
CONDITIONS = ("cast(id as int) % 2 = 0", "cast(id as int) % 100 = 0")
MB = 1e6


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One line of the results: ours against the bare part, over all repeats.

    Attributes:
        ours, bare: rates of all repeats.
        unit: unit of the rates.
        note: further figures, as text.
    """

    name: str
    unit: str
    ours: list[float]
    bare: list[float]
    note: str = ""

    @property
    def ratio(self) -> float:
        """Median rate of ours divided by that of the bare part."""
        return statistics.median(self.ours) / statistics.median(self.bare)


def time_call(work: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def write_first_passages(source: str, rows: int, file: Path) -> list[str]:
    """Write the first passages of a source to a file; return their texts as they are encoded."""
    batches, read = [], 0
    for batch in read_passages(find_passages(locate(source, StorageConfig()))):
        batches.append(batch.passages)
        read += batch.passages.num_rows
        if read >= rows:
            break
    table = pa.Table.from_batches(batches).slice(0, rows)
    pq.write_table(table, file)
    return [format_passage(row["title"], row["text"]) for row in table.to_pylist()]


def time_build(passages: Path, output: Path, **request: Any) -> tuple[Built, float]:
    """Build an index from scratch; return it and the seconds that the call took."""
    shutil.rmtree(output, ignore_errors=True)
    begun = time.perf_counter()
    built = run_build(check_build(BuildRequest(str(passages), str(output), **request)))
    return built, time.perf_counter() - begun


def compare_encoding(source: str, rows: int, shards: int, repeats: int, folder: Path) -> list[Comparison]:
    """Compare the build with a bare encoder loop: the time of the shards alone, and the whole call."""
    texts = write_first_passages(source, rows, folder / "passages.parquet")
    model = Encoder.load("demo", "cpu")
    model.encode(texts[:64])  # warm-up
    bare, working, whole = [], [], []
    for _ in range(repeats):
        bare.append(len(texts) / time_call(lambda: model.encode(texts)))
        built, seconds = time_build(folder / "passages.parquet", folder / "encoded", shards=shards)
        working.append(len(texts) / sum(report.seconds for report in built.reports))
        whole.append(len(texts) / seconds)
    return [
        Comparison(
            "encode and build", "passages/s", working, bare, f"{len(texts)} passages, {shards} shards, one actor"
        ),
        Comparison("encode and build, with checks and startup", "passages/s", whole, bare),
    ]


def compare_reranking(source: str, queries: int, repeats: int, folder: Path) -> Comparison:
    """Compare concurrent queries that are reranked with the bare cross-encoder, which gets all pairs at once."""
    retrieval = RetrievalConfig(device="cpu", rerank=RerankConfig(model="demo"))
    reranker = Reranker.load(retrieval)
    texts = write_first_passages(source, queries * reranker.candidates, folder / "reranked.parquet")
    found = [RetrievedPassage(Passage(str(n), "", text), 1.0, 1) for n, text in enumerate(texts)]
    asked = [
        (passages[0].passage.text[:60], passages)
        for passages in (found[n : n + reranker.candidates] for n in range(0, len(found), reranker.candidates))
    ]
    pairs = [(query, one.passage.text) for query, passages in asked for one in passages]

    async def rerank_all() -> None:
        batcher = Batcher("rerank", reranker.rerank, reranker.queries_per_call, retrieval.wait_ms / 1000)
        await asyncio.gather(*map(batcher.ask, asked))
        batcher.close()

    model = CrossEncoder(str(find_reranker(retrieval.rerank)[0]), device="cpu")
    model.predict(pairs[:64])  # warm-up
    ours, bare = [], []
    for _ in range(repeats):
        bare.append(len(pairs) / time_call(lambda: model.predict(pairs, batch_size=reranker.batch_size)))
        ours.append(len(pairs) / time_call(lambda: asyncio.run(rerank_all())))
    return Comparison("rerank", "pairs/s", ours, bare, f"{len(asked)} queries at once, {len(pairs)} pairs")


def draw_clustered(rows: int, dimension: int, seed: int = 0) -> Vectors:
    """Return unit vectors around 4,000 centers, like embeddings around topics: float32 [rows, dimension]."""
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(99).normal(size=(4000, dimension)).astype(np.float32)
    vectors = centers[rng.integers(0, len(centers), rows)]
    vectors += rng.normal(size=vectors.shape).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def name_texts(rows: int, number: int) -> list[str]:
    """Return the texts of the passages of a file."""
    return [f"passage {row}" for row in range(number * FILE_ROWS, number * FILE_ROWS + rows)]


def write_vectors(
    rows: int, dimension: int, folder: Path, write_texts: Callable[[int, int], list[str]] = name_texts
) -> None:
    """Write passages with given vectors, in files of ``FILE_ROWS`` rows.

    Args:
        write_texts: returns so many texts for the file with a number.
    """
    folder.mkdir()
    for number, start in enumerate(range(0, rows, FILE_ROWS)):
        names = [str(row) for row in range(start, min(start + FILE_ROWS, rows))]
        vectors = draw_clustered(len(names), dimension, number)
        column = pa.FixedSizeListArray.from_arrays(vectors.ravel(), dimension)
        texts = write_texts(len(names), number)
        table = pa.table({"id": names, "title": [""] * len(names), "text": texts, "vector": column})
        pq.write_table(table, folder / f"{number:03d}.parquet", row_group_size=50_000, compression="NONE")


def draw_all_vectors(rows: int, dimension: int) -> Vectors:
    """Return the vectors that ``write_vectors`` writes."""
    starts = enumerate(range(0, rows, FILE_ROWS))
    return np.concatenate([draw_clustered(min(FILE_ROWS, rows - start), dimension, n) for n, start in starts])


def compare_adding(
    rows: int, dimension: int, factory: str, shards: int, repeats: int, folder: Path
) -> tuple[list[Comparison], Any]:
    """Compare the build from precomputed vectors with ``faiss.add``; also return the bare index of all vectors."""
    request = {"form": PassageForm(embeddings="vector"), "factory": factory, "shards": shards}
    vectors = draw_all_vectors(rows, dimension)
    ours, bare, peak, index = [], [], 0.0, None
    for _ in range(repeats):
        built, _ = time_build(folder / "vectors", folder / "given", **request)
        ours.append(rows / sum(report.seconds for report in built.reports))
        peak = max(report.peak_bytes for report in built.reports) / MB
        index = faiss.read_index(str(folder / "given" / built.manifest.shards[0].file))
        index.reset()  # keeps its training
        begun = time.perf_counter()
        index.add(vectors)
        bare.append(rows / (time.perf_counter() - begun))
    shard = max(shard.bytes + shard.passages_bytes for shard in built.manifest.shards) / MB
    note = f"{shards} shards of {shard:,.0f} MB; peak memory of a builder {peak:,.0f} MB"
    return [Comparison(f"{factory}: build from precomputed vectors", "vectors/s", ours, bare, note)], index


def compare_searching(
    index: Any, search: str, factory: str, repeats: int, threads: int, folder: Path
) -> list[Comparison]:
    """Compare search over the shards with search in one FAISS index of all vectors, and filtered with whole search."""
    retrieval = RetrievalConfig(device="cpu", search=search, threads=threads, verify=False)
    sharded = PassageIndex.open(locate(str(folder / "given"), StorageConfig()), retrieval)
    set_search(index, faiss.ParameterSpace(), search)
    queries = draw_clustered(BATCH, index.d, 12345)
    faiss.omp_set_num_threads(threads)
    ours_rates, bare_rates = [], []
    found, wanted = sharded.search(queries, K), index.search(queries, K)[1]  # also the warm-up of both
    for _ in range(repeats):
        bare_rates.append(BATCH / time_call(lambda: index.search(queries, K)))
        ours_rates.append(BATCH / time_call(lambda: sharded.search(queries, K)))
    starts = np.cumsum([0, *(shard.rows for shard in sharded.manifest.shards)])
    rows = [_number_hits(hits, starts) for hits in found]
    same = statistics.mean(ours == bare for ours, bare in zip(rows, wanted.tolist(), strict=True))
    recall = statistics.mean(len(set(a) & set(b)) / K for a, b in zip(rows, wanted.tolist(), strict=True))
    note = f"{len(starts) - 1} shards vs. one; same for {100 * same:.0f} % of queries, {100 * recall:.1f} % of hits"
    name = f"{factory} {search}".strip()
    whole = Comparison(f"{name}: search", "queries/s", ours_rates, bare_rates, note)
    return [whole, *(compare_filtering(sharded, queries, name, condition, repeats) for condition in CONDITIONS)]


def compare_filtering(index: PassageIndex, queries: Vectors, name: str, condition: str, repeats: int) -> Comparison:
    """Compare filtered search with the same search of all vectors."""
    seconds = time_call(lambda: [shard.select((condition,)) for shard in index.shards.values()])
    index.search(queries, K, (condition,))  # warm-up
    ours, bare = [], []
    for _ in range(repeats):
        bare.append(len(queries) / time_call(lambda: index.search(queries, K)))
        ours.append(len(queries) / time_call(lambda: index.search(queries, K, (condition,))))
    note = f"evaluating the condition once: {1000 * seconds:,.0f} ms"
    return Comparison(f"{name}: filtered, {condition}", "queries/s", ours, bare, note)


def _number_hits(hits: Sequence[Hit], starts: npt.NDArray[np.int64]) -> list[int]:
    """Return the row numbers of hits over all shards."""
    return [int(starts[hit.shard]) + hit.row for hit in hits]


def build_figures_table(lines: list[Comparison]) -> Table:
    """Return a table of all lines with their medians and ratios."""
    table = Table(title="Compared with the bare components")
    for heading in ("", "ours", "bare", "unit", "ours / bare", "min … max", ""):
        table.add_column(heading, justify="right" if "ours" in heading or heading == "bare" else "left")
    for line in lines:
        ratios = sorted(a / b for a, b in zip(line.ours, line.bare, strict=True))
        medians = [f"{statistics.median(values):,.1f}" for values in (line.ours, line.bare)]
        table.add_row(
            line.name, *medians, line.unit, f"{line.ratio:.3f}", f"{ratios[0]:.3f} … {ratios[-1]:.3f}", line.note
        )
    return table


def report_figures(lines: list[Comparison], file: Path | None, threads: int) -> None:
    """Print a table of all lines, and write them to a JSON file if there is one."""
    Console(width=None if os.isatty(1) else 200).print(build_figures_table(lines))
    if file:
        machine = {"processor": platform.processor() or platform.machine(), "cpus": os.cpu_count(), "threads": threads}
        figures = [{**dataclasses.asdict(line), "ratio": line.ratio} for line in lines]
        file.write_text(json.dumps({"machine": machine, "figures": figures}, indent=2))


def benchmark_index(
    passages: Annotated[str, typer.Option(help="Passages to encode, as Parquet.")],
    encoded: Annotated[int, typer.Option(min=0, help="Number of passages to encode; 0 for none.")] = 2000,
    reranked: Annotated[int, typer.Option(min=0, help="Number of queries to rerank; 0 for none.")] = 16,
    vectors: Annotated[
        int, typer.Option(min=0, help="Synthetic vectors to index in the other comparisons; 0 for none.")
    ] = 2_000_000,
    dimension: Annotated[
        int, typer.Option(min=8, help="Dimension of these vectors; by default that of the demo encoder.")
    ] = 384,
    factory: Annotated[str, typer.Option(help="FAISS factory string to compare in addition to Flat.")] = "IVF1024,SQ8",
    search: Annotated[str, typer.Option(help="Search parameters for this factory.")] = "nprobe=16",
    shards: Annotated[int, typer.Option(min=1)] = 4,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    threads: Annotated[int, typer.Option(min=1, help="FAISS threads for search, on both sides.")] = os.cpu_count() or 1,
    scratch: Annotated[Path | None, typer.Option(help="Folder for temporary indexes of several gigabytes.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures to this JSON file.")] = None,
) -> None:
    """Compare the index with its bare parts, side by side in one run."""
    start_logging()
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        folder = Path(name)
        lines = compare_encoding(passages, encoded, shards, repeats, folder) if encoded else []
        if reranked:
            lines.append(compare_reranking(passages, reranked, repeats, folder))
        if vectors:
            write_vectors(vectors, dimension, folder / "vectors")
        for kind, parameters in (("Flat", ""), (factory, search)) if vectors else ():
            adding, index = compare_adding(vectors, dimension, kind, shards, repeats, folder)
            lines += [*adding, *compare_searching(index, parameters, kind, repeats, threads, folder)]
    report_figures(lines, json_file, threads)


if __name__ == "__main__":
    run(benchmark_index)
