"""Run the embedded default end to end: model, encoder and index, a run over the demo queries, and its results.

``python -m jobs.demo [--output out/demo] [--rows N]``

The model decides when to retrieve and chooses among three passages by its own critique. Two baselines show the benefit:
answering from the first passage found, and never retrieving. Both are read from the run's candidates, since the run
explores both branches of the first decision.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import typer
from rich.console import Console

from jobs.common import start_logging, working
from jobs.evaluation_tables import build_comparison_table
from jobs.shell import run
from pipeline.config.loading import validate_section
from pipeline.config.run import RunConfig, get_cache_folder
from pipeline.config.sections import (
    DecodingConfig,
    ExecutionConfig,
    ModelConfig,
    Profile,
    RetrievalConfig,
    StorageConfig,
)
from pipeline.demo_models import build_demo_encoder, build_demo_model, build_once
from pipeline.evaluation.evaluate import (
    Evaluation,
    View,
    answer_from_first_passage,
    answer_without_retrieval,
    evaluate_set,
)
from pipeline.evaluation.metrics import best_over_golds, contains
from pipeline.indexing.build import BuildRequest
from pipeline.indexing.form import PassageForm
from pipeline.output.folder import REPORT
from pipeline.run.driver import annotate_set
from pipeline.storage.location import locate

DEMO = Path(__file__).parent.parent / "infra" / "demo"
PASSAGES = DEMO / "passages.parquet"
QUERIES = DEMO / "queries.parquet"

MAIN = "adaptive"
BASELINES: Mapping[str, View] = {"first passage": answer_from_first_passage, "never": answer_without_retrieval}
DECODING = DecodingConfig(passages=3, max_tokens=60, keep_candidates=True, explore=True)
# Exploring reads passages for every row; instructions need none, so that one passage is enough.
INSTRUCTION = Profile(decoding={"passages": 1})
# Two-part questions: answers of several segments, each with a citation.
LONG_FORM = Profile(decoding={"segments": 4, "citations": True, "max_tokens": 40}, metric="str_em")

# Small enough to show progress; three units in flight keep the engine full.
UNIT_ROWS = 8
# Shards of the index; two, so that it can show both topologies.
SHARDS = 2
SHOWN = 10
SHOWN_METRICS = ("match", "f1", "recall@1", "str_em")


@dataclass(frozen=True)
class DemoSet:
    """The annotated demo set.

    Attributes:
        counts: counts in the manifest, so those of the call that did the work.
    """

    folder: Path
    exit_status: int
    counts: Mapping[str, Any]


def get_demo_index() -> Path:
    """Return the demo index in the cache folder; build it on first use of these passages and this encoder.

    Raises:
        RuntimeError: the encoder must be downloaded and cannot be.
    """
    digest = hashlib.sha256(
        PASSAGES.read_bytes() + f"{build_demo_encoder().name}, {SHARDS} shards".encode()
    ).hexdigest()
    return build_once(get_cache_folder() / f"demo-index-{digest[:12]}", _build_index)


def _build_index(target: Path) -> None:
    from pipeline.indexing.build import check_build
    from pipeline.indexing.build_pool import run_build

    form = PassageForm(embeddings="vector")
    run_build(check_build(BuildRequest(str(PASSAGES), str(target), form=form, shards=SHARDS)))


def write_first_rows(queries: Path, rows: int, file: Path) -> Path:
    """Write the first rows of a query set to a file of their own."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pq.read_table(queries).slice(0, rows), file)
    return file


def annotate_demo(queries: Path, index: Path, folder: Path, overwrite: bool, topology: str) -> DemoSet:
    """Annotate the queries; units that an earlier call finished are kept unless ``overwrite`` is set."""
    config = RunConfig(
        queries=str(queries),
        output=str(folder),
        index=str(index),
        model=ModelConfig(name="demo"),
        decoding=DECODING,
        profiles={"two_questions": LONG_FORM, "instruction": INSTRUCTION},
        retrieval=validate_section(RetrievalConfig, {"topology": topology}, "retrieval"),
        # On a machine with few cores the engine needs all of them; searching this small index takes almost none.
        execution=ExecutionConfig(unit_rows=UNIT_ROWS, shard_servers=SHARDS, cpus_per_server=0),
    )
    status = annotate_set(config, overwrite).exit_status
    return DemoSet(folder, status, json.loads((folder / "_manifest.json").read_text())["counts"])


def evaluate_demo(folder: Path) -> dict[str, Evaluation]:
    """Evaluate the run and its baselines."""
    location = locate(str(folder), StorageConfig())
    return {MAIN: evaluate_set(location), **{name: evaluate_set(location, view=v) for name, v in BASELINES.items()}}


def describe_answers(folder: Path) -> list[str]:
    """Describe some rows with evidence and scores: long answers, short ones, and some without retrieval."""
    rows = pa.concat_tables(map(pq.read_table, sorted((folder / "data").glob("*.parquet")))).to_pylist()
    long = [row for row in rows if len(row["segments"]) > 1]
    read = [row for row in rows if row["retrieved"] and row not in long]
    unread = [row for row in rows if not row["retrieved"]]
    few = SHOWN // 4
    shown = long[:few] + read[: SHOWN - few - min(few, len(unread))] + unread[:few]
    return [line for row in shown for line in _describe_answer(row)]


def _describe_answer(row: Mapping[str, Any]) -> list[str]:
    titles = ", ".join(dict.fromkeys(passage["title"] for passage in row["passages"]))
    evidence = f" (from {titles})" if titles else ""
    figures = {"p(retrieve)": row["retrieve_probability"]}
    for title, name in (("IsRel", "is_rel"), ("IsSup", "is_sup"), ("IsUse", "is_use"), ("score", "score")):
        figures[title] = _average_score(row["segments"], name)
    told = ", ".join(f"{title} {value:.2f}" for title, value in figures.items() if value is not None)
    return [
        _shorten(row["query"]),
        f"  {_mark_answer(row['answer'], row['answers'])} {_shorten(row['answer'])}{evidence}",
        f"    {told}",
    ]


def _mark_answer(answer: str, golds: Sequence[str] | None) -> str:
    if not golds:
        return "–"
    return "✓" if best_over_golds(contains, answer, golds) else "✗"


def _average_score(segments: Sequence[Mapping[str, Any]], name: str) -> float | None:
    present = [segment[name] for segment in segments if segment[name] is not None]
    return sum(present) / len(present) if present else None


def _shorten(text: str, longest: int = 120) -> str:
    line = " ".join(text.split())
    return line if len(line) <= longest else line[: longest - 1] + "…"


def summarize_demo(annotated: DemoSet, evaluated: Mapping[str, Evaluation]) -> list[str]:
    """Summarize the run in a few lines: matches beside the baselines', retrievals, throughput and output files."""
    lines = []
    if "match" in evaluated[MAIN].overall.metrics:
        matches = {name: evaluation.overall.metrics["match"].mean for name, evaluation in evaluated.items()}
        others = ", ".join(f"{100 * match:.1f} % {name}" for name, match in matches.items() if name != MAIN)
        lines.append(f"Answers that contain a gold answer: {100 * matches[MAIN]:.1f} % {MAIN}; {others}.")
    counts = annotated.counts
    lines.append(
        f"{counts['retrieved']} of {counts['rows']} rows used a passage. {counts['annotated']} rows in "
        f"{counts['seconds']:.0f} s, {counts['annotated'] / counts['seconds']:.2f} rows/s, including engine startup."
    )
    return [*lines, f"annotated set: {annotated.folder}", f"report: {annotated.folder}/{REPORT}"]


def demo(
    output: Annotated[Path, typer.Option(help="Folder for the annotated set.")] = Path("out/demo"),
    rows: Annotated[int | None, typer.Option(min=1, help="Annotate only the first N queries; all by default.")] = None,
    queries: Annotated[Path, typer.Option(help="Query set: a Parquet file with gold answers.")] = QUERIES,
    topology: Annotated[
        str, typer.Option(help="local: each actor holds the index; partitioned: shard servers hold its shards.")
    ] = "local",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing annotated set.")] = False,
) -> None:
    """Annotate the demo queries with the embedded model and show the results beside two baselines.

    The first run downloads and builds model, encoder and index into the cache folder (SELFRAG_CACHE). A second run
    with the same output folder continues an unfinished set and shows the results.
    """
    start_logging(progress=["pipeline.demo_models"])
    with working(resumable=True, overwrite=overwrite):
        build_demo_model()
        index = get_demo_index()
        chosen = write_first_rows(queries, rows, output / "queries.parquet") if rows else queries
        annotated = annotate_demo(chosen, index, output / MAIN, overwrite, topology)
    console = Console()
    console.print("Some answers (✓ contains a gold answer, ✗ does not, – has none to compare with):", highlight=False)
    for line in describe_answers(annotated.folder):
        console.print(line, highlight=False, markup=False)
    evaluated = evaluate_demo(annotated.folder)
    console.print(build_comparison_table(evaluated, SHOWN_METRICS))
    for line in summarize_demo(annotated, evaluated):
        console.print(line, highlight=False)
    raise typer.Exit(annotated.exit_status)


if __name__ == "__main__":
    run(demo)
