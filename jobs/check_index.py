"""Check that an index is intact, and measure which search parameters reach a target recall.

``python -m jobs.check_index --index URI [--queries URI] [--recall 0.95]``

Latency and throughput of the search are those of the CPU. Recall holds for any device, since CPU and GPU search the
same lists with the same parameters.
"""

import dataclasses
import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from jobs.common import IndexFile, IndexSettings, checking, start_logging, working
from jobs.shell import run
from pipeline.config.loading import validate_section
from pipeline.config.run import load_sections
from pipeline.config.sections import RetrievalConfig, StorageConfig
from pipeline.indexing.check import Checked, CheckRequest, check_index_folder


def check_index(
    index: Annotated[str, typer.Option(help="Index folder made by jobs.build_index.")],
    queries: Annotated[
        str | None, typer.Option(help="Query set to search with; by default, passages of the index.")
    ] = None,
    sample: Annotated[int, typer.Option(min=1, help="Number of queries to search with.")] = 200,
    k: Annotated[int, typer.Option("--k", min=1, help="Passages per query.")] = 10,
    recall: Annotated[float, typer.Option(min=0.0, max=1.0, help="Target recall.")] = 0.95,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    config: IndexFile = None,
    settings: IndexSettings = None,
) -> None:
    """Check that every file of an index is intact, and measure its recall, latency and throughput.

    With queries that have a gold_passage_id, also measure how often that passage is found, and what a reranker
    (--set retrieval.rerank.model=NAME) gains and costs.

    Exit status: 0 intact, 1 damaged or not readable, 2 bad usage.
    """
    start_logging(timestamps=True)
    with checking():
        sections = load_sections(config, settings or [], ["storage", "retrieval"])
        storage = validate_section(StorageConfig, sections["storage"], "storage")
        retrieval = validate_section(RetrievalConfig, sections["retrieval"], "retrieval")
    with working():
        checked = check_index_folder(CheckRequest(index, storage, retrieval, queries, sample, k, recall))
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(checked)))
        return
    Console().print(build_speeds_table(checked))
    if checked.gold:
        Console().print(build_gold_table(checked))
    for line in summarize_check(checked):
        typer.echo(line)


def summarize_check(checked: Checked) -> list[str]:
    """Summarize the check in a few lines: index, queries, and the recommended search parameters."""
    source = "passages of the index, which are easier to find than questions" if checked.own else "the query set"
    lines = [
        f"{checked.index}: intact, {checked.passages} passages in {checked.shards} shards of {checked.factory}",
        f"queries: {source}; recall measured against {checked.reference}",
    ]
    if checked.truncation:
        lines.append(checked.truncation)
    if checked.advice is None:
        lines.append(f"no search setting reaches a recall of {checked.wanted:g}; build the index with another factory")
    elif checked.advice:
        lines.append(f"for a recall of {checked.wanted:g}: --set retrieval.search={checked.advice}")
    return lines


def build_speeds_table(checked: Checked) -> Table:
    """Return a table with a line for each search setting; those that reach the target recall are marked."""
    table = Table(title=f"{checked.queries} queries, {checked.k} passages each")
    for heading in ("search", f"recall@{checked.k}", "", "ms, median", "ms, p95", "queries/s in batches of 64"):
        table.add_column(heading, justify="left" if heading == "search" else "right")
    for speed in checked.speeds:
        mark = "✓" if speed.recall >= checked.wanted else ""
        times = [f"{speed.median_ms:.2f}", f"{speed.p95_ms:.2f}", f"{speed.queries_per_s:,.0f}"]
        table.add_row(speed.search or "–", f"{speed.recall:.3f}", mark, *times)
    return table


def build_gold_table(checked: Checked) -> Table:
    """Return a table with the recall of the gold passages for each way to search."""
    table = Table(title=f"gold passages of {checked.golds} queries")
    table.add_column("")
    for cutoff in checked.gold[0].recall:
        table.add_column(f"recall@{cutoff}", justify="right")
    table.add_column("ms a query", justify="right")
    for way in checked.gold:
        table.add_row(way.way, *(f"{recall:.3f}" for recall in way.recall.values()), f"{way.query_ms:.1f}")
    return table


if __name__ == "__main__":
    run(check_index)
