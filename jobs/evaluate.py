"""Evaluate an annotated set: answers, citations, retrieval and critique against gold answers and gold passages.

``python -m jobs.evaluate --annotations URI [--task NAME] [--by COLUMN] [--baseline NAME=URI]... [--json FILE]
[--sweep FOLDER] [--reliability] [--alce FILE] [--factscore FILE]``

Gold answers and passages are columns of the query set, which pass through annotation unchanged: ``answers``
(list<string>: the label, short answers or long references, depending on the task), ``short_answers``
(list<list<string>>: ASQA's sets of short answers) and ``gold_passage_id``. Rows without them are counted, not graded.
"""

import json
import logging
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console

from jobs.common import RunFile, StorageSettings, checking, start_logging
from jobs.evaluation_tables import (
    build_comparison_table,
    build_differences_table,
    build_reliability_table,
    build_sweep_tables,
)
from jobs.shell import run
from pipeline.config.run import load_storage
from pipeline.evaluation.evaluate import Evaluation, Row, evaluate_set, iterate_rows
from pipeline.evaluation.exports import EXPORTED, encode_alce, encode_factscore
from pipeline.evaluation.sweep import Sweep, save_sweep, sweep_set
from pipeline.evaluation.words import split_pair, split_squad_pair
from pipeline.output.folder import OutputFolder, get_columns
from pipeline.storage.location import Location, locate

MAIN = "annotations"


def _parse_baselines(options: list[str]) -> dict[str, str]:
    pairs = [option.partition("=") for option in options]
    for (name, _, uri), option in zip(pairs, options, strict=True):
        if not name or not uri or name == MAIN:
            raise ValueError(f"--baseline {option}: expected NAME=URI with a name other than {MAIN!r}")
    return {name: uri for name, _, uri in pairs}


def _to_record(evaluation: Evaluation) -> dict[str, object]:
    groups = {name: asdict(figures) for name, figures in evaluation.by_group.items()}
    return {"annotations": evaluation.annotations, "overall": asdict(evaluation.overall), "groups": groups}


def encode_figures(main: Evaluation, baselines: Mapping[str, Evaluation]) -> str:
    """Encode all figures as JSON."""
    others = {}
    for name, other in baselines.items():
        found = main.compare_with(other)
        differences = {metric: asdict(difference) for metric, difference in found.items()}
        others[name] = {**_to_record(other), "difference": differences}
    return json.dumps({**_to_record(main), "baselines": others}, indent=2, ensure_ascii=False)


def _export(folder: Location, task: str | None, export: Callable[[Iterable[Row], str], str], file: Location) -> None:
    columns = get_columns(OutputFolder(folder).read_manifest() or {})
    rows = iterate_rows(folder / "data", [columns.query, columns.task, *EXPORTED], required=[columns.query, "passages"])
    chosen = (row for row in rows if task in (None, row.get(columns.task)))
    file.write(export(chosen, columns.query).encode())
    logging.info("written: %s", file.uri)


JsonFile = Annotated[
    str | None,
    typer.Option("--json", help="Write the figures to this JSON file; - prints them on stdout instead of the table."),
]
Baselines = Annotated[
    list[str] | None, typer.Option(help="NAME=URI of another set of the same queries to compare with; repeatable.")
]
SweepFolder = Annotated[
    str | None,
    typer.Option(help="Sweep weights, δ and constraints over the candidates; write the results to this folder."),
]
Squad = Annotated[
    bool, typer.Option("--squad", help="Compare words as SQuAD's script does, as papers do; has no effect on --sweep.")
]
Reliability = Annotated[
    bool, typer.Option("--reliability", help="Show how often passages and answers are right, by the critique's score.")
]
AlceFile = Annotated[str | None, typer.Option("--alce", help="Write the rows in ALCE's input format to this file.")]
FactscoreFile = Annotated[
    str | None, typer.Option("--factscore", help="Write the rows in FActScore's input format to this file.")
]


def evaluate(
    annotations: Annotated[str, typer.Option(help="Folder of an annotated set: the --output of jobs.annotate.")],
    task: Annotated[str | None, typer.Option(help="Evaluate only the rows of this task.")] = None,
    by: Annotated[str | None, typer.Option(help="Column to group the figures by; the task by default.")] = None,
    json_file: JsonFile = None,
    baseline: Baselines = None,
    sweep: SweepFolder = None,
    squad: Squad = False,
    reliability: Reliability = False,
    alce_file: AlceFile = None,
    factscore_file: FactscoreFile = None,
    config: RunFile = None,
    settings: StorageSettings = None,
) -> None:
    """Compare an annotated set with gold answers, and with other annotated sets of the same queries."""
    start_logging(logging.INFO)
    with checking():
        storage = load_storage(config, settings or [])
        sets = {MAIN: annotations, **_parse_baselines(baseline or [])}
        split = split_squad_pair if squad else split_pair
        evaluated = {name: evaluate_set(locate(uri, storage), by, task, split=split) for name, uri in sets.items()}
        main, others = evaluated[MAIN], {name: other for name, other in evaluated.items() if name != MAIN}
        found = sweep_set(locate(annotations, storage), task) if sweep else None
        if found and sweep:
            save_sweep(found, locate(sweep, storage))
        for file, export in ((alce_file, encode_alce), (factscore_file, encode_factscore)):
            if file is not None:
                _export(locate(annotations, storage), task, export, locate(file, storage))
        if json_file not in (None, "-"):
            locate(str(json_file), storage).write(encode_figures(main, others).encode())
    if json_file == "-":
        sys.stdout.write(encode_figures(main, others) + "\n")
        return
    print_evaluation(evaluated, found, reliability)


def print_evaluation(evaluated: Mapping[str, Evaluation], swept: Sweep | None, reliability: bool) -> None:
    """Print the figures of the set and its baselines, of its sweep, and its reliability, if these were asked for."""
    console, main = Console(), evaluated[MAIN]
    tables = [build_comparison_table(evaluated)]
    if reliability:
        judged = {"IsRel": main.overall.isrel, "IsSup": main.overall.issup}
        tables += [build_reliability_table(title, found) for title, found in judged.items() if found is not None]
        if not any(judged.values()):
            logging.warning(
                "no reliability: it needs gold passages or answers, and decoding.keep_candidates=true in the run"
            )
    if swept is not None:
        tables += build_sweep_tables(swept)
    if len(evaluated) > 1:
        tables.append(build_differences_table(main, {name: evaluated[name] for name in evaluated if name != MAIN}))
    for table in tables:
        console.print(table)


if __name__ == "__main__":
    run(evaluate)
