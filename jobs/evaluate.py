"""Evaluate an annotated set: answers and critique against gold answers and gold passages.

``python -m jobs.evaluate --annotations URI [--task NAME] [--json FILE] [--baseline NAME=URI]...``

Gold answers stand in the column ``answers``, the gold passage's id in ``gold_passage_id``; both come from the
query set and pass through annotation unchanged. Rows without gold answers are counted, not graded.
"""

import json
import logging
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from pyarrow import dataset
from rich.console import Console
from rich.table import Table

from pipeline.config import StorageConfig
from pipeline.metrics import Outcome, Scores, Tally
from pipeline.storage import Location, StorageError, locate

log = logging.getLogger(__name__)

NO_TASK = "(none)"
Row = dict[str, Any]
COLUMNS = ("task", "answer", "retrieved", "answers", "gold_passage_id", "candidates")


@dataclass(frozen=True)
class Evaluation:
    """Figures of one annotated set, overall and by task (by name; rows without one are under ``(none)``)."""

    annotations: str
    overall: Scores
    tasks: dict[str, Scores]


def first_passage(row: Row) -> Row:
    """The row as it would be had the model read the first passage alone, where its candidates tell."""
    first = next((c for c in row.get("candidates") or [] if c["rank"] == 1), None)
    return row if first is None else {**row, "answer": first["text"]}


def evaluate_set(uri: str, task: str | None = None, view: Callable[[Row], Row] = lambda row: row) -> Evaluation:
    """Evaluate the annotated set in a folder.

    Args:
        task: take the rows of this task only.
        view: applied to each row first, such as :func:`first_passage`.

    Raises:
        ValueError: no annotated set there, no gold answers in it, or no rows of the task.
        StorageError: it cannot be read.
    """
    folder = locate(uri, StorageConfig())
    tallies: defaultdict[str, Tally] = defaultdict(Tally)
    overall = Tally()
    for row in _rows(folder / "data", required=True):
        name = row.get("task") or NO_TASK
        if task in (None, name):
            outcome = outcome_of(view(row))
            tallies[name].add(outcome)
            overall.add(outcome)
    for row in _rows(folder / "errors", required=False):
        name = row.get("task") or NO_TASK
        if task in (None, name):
            tallies[name].errors += 1
            overall.errors += 1
    if not tallies:
        raise ValueError(f"{uri}: no rows of task {task!r}" if task else f"{uri}: no rows")
    if not (folder / "_SUCCESS").exists():
        log.warning("%s has no _SUCCESS: the run that writes it is not finished", uri)
    return Evaluation(uri, overall.scores(), {name: tallies[name].scores() for name in sorted(tallies)})


def outcome_of(row: Mapping[str, Any]) -> Outcome:
    """One annotated row, as far as it is judged; candidates without an IsRel token are left out."""
    gold = row.get("gold_passage_id")
    candidates = (row.get("candidates") or []) if gold is not None else []
    return Outcome(
        answer=row["answer"] or "",
        retrieved=bool(row["retrieved"]),
        golds=tuple(row["answers"] or ()),
        relevance=tuple((c["passage_id"] == gold, c["is_rel"]) for c in candidates if c["is_rel"] is not None),
    )


def _rows(folder: Location, required: bool) -> Iterator[dict[str, Any]]:
    files = folder.files(".parquet")
    if not files:
        if required:
            raise ValueError(f"{folder.uri}: no Parquet files; --annotations names the --output of jobs.annotate")
        return
    data = dataset.dataset([file.path for file in files], filesystem=folder.filesystem, format="parquet")
    missing = [name for name in ("answer", "retrieved", "answers") if name not in data.schema.names]
    if required and missing:
        raise ValueError(f"{folder.uri}: no column {missing[0]!r}; it has {', '.join(data.schema.names)}")
    for batch in data.to_batches(columns=[name for name in COLUMNS if name in data.schema.names]):
        yield from batch.to_pylist()


def comparison(named: Mapping[str, Evaluation]) -> Table:
    """A table with a line for each set and task."""
    table = Table(title="Evaluation")
    several = len(named) > 1
    for heading in (["set"] if several else []) + ["task"]:
        table.add_column(heading)
    for heading in ("rows", "errors", "retrieved", "match", "exact", "F1", "IsRel AUC"):
        table.add_column(heading, justify="right")
    for name, evaluation in named.items():
        tasks = {**evaluation.tasks, "all": evaluation.overall} if len(evaluation.tasks) != 1 else evaluation.tasks
        for task, scores in tasks.items():
            table.add_row(*([name] if several else []), task, *_cells(scores), end_section=task == list(tasks)[-1])
    return table


def _cells(scores: Scores) -> list[str]:
    shares = (scores.retrieval_rate, scores.match, scores.exact_match, scores.f1)
    percent = ["–" if share is None else f"{100 * share:.1f} %" for share in shares]
    area = "–" if scores.isrel_auc is None else f"{scores.isrel_auc:.3f}"
    return [f"{scores.rows:,}", f"{scores.errors:,}", *percent, area]


def _baselines(options: list[str]) -> dict[str, str]:
    pairs = [option.partition("=") for option in options]
    for (name, _, uri), option in zip(pairs, options, strict=True):
        if not name or not uri:
            raise ValueError(f"--baseline {option}: expected NAME=URI")
    return {name: uri for name, _, uri in pairs}


def _report(main: Evaluation, baselines: Mapping[str, Evaluation]) -> str:
    others = {name: asdict(evaluation) for name, evaluation in baselines.items()}
    return json.dumps({**asdict(main), "baselines": others}, indent=2, ensure_ascii=False)


def evaluate(
    annotations: Annotated[str, typer.Option(help="Folder of an annotated set: the --output of jobs.annotate.")],
    task: Annotated[str | None, typer.Option(help="Only the rows of this task.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here; - is stdout, instead of the table.")
    ] = None,
    baseline: Annotated[list[str] | None, typer.Option(help="NAME=URI of a set to show beside it; repeatable.")] = None,
) -> None:
    """Compare an annotated set with gold answers."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        main = evaluate_set(annotations, task)
        baselines = {name: evaluate_set(uri, task) for name, uri in _baselines(baseline or []).items()}
        if json_file is not None and str(json_file) != "-":
            locate(str(json_file), StorageConfig()).write(_report(main, baselines).encode())
    except (ValueError, StorageError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    if str(json_file) == "-":
        sys.stdout.write(_report(main, baselines) + "\n")
    else:
        Console().print(comparison({"annotations": main, **baselines}))


if __name__ == "__main__":
    typer.run(evaluate)
