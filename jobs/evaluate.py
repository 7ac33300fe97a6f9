"""Evaluate an annotated set: answers, citations, retrieval and critique against gold answers and gold passages.

``python -m jobs.evaluate --annotations URI [--task NAME] [--by COLUMN] [--baseline NAME=URI]... [--json FILE]
[--sweep FOLDER] [--alce FILE] [--factscore FILE]``

Gold answers and passages are columns of the query set, which pass through annotation unchanged: ``answers``
(list<string>: the label, short answers or long references, depending on the task), ``short_answers``
(list<list<string>>: ASQA's sets of short answers) and ``gold_passage_id``. Rows without them are counted, not graded.
"""

import json
import logging
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from jobs.common import RunFile, StorageSettings, checking, start_logging
from jobs.shell import run
from pipeline.config.run import load_storage
from pipeline.evaluation.evaluate import Evaluation, Figures, Row, evaluate_set, iterate_rows
from pipeline.evaluation.exports import EXPORTED, encode_alce, encode_factscore
from pipeline.evaluation.statistics import Calibration, Estimate
from pipeline.evaluation.sweep import Sweep, save_sweep, sweep_set
from pipeline.evaluation.words import split_pair, split_squad_pair
from pipeline.output.folder import OutputFolder, get_columns
from pipeline.storage.location import Location, locate

MAIN = "annotations"
TITLES = {"exact_match": "exact", "f1": "F1", "str_em": "str-EM", "rouge_l": "ROUGE-L"}


def build_comparison_table(named: Mapping[str, Evaluation], only: Collection[str] = ()) -> Table:
    """Return a table with a line for each set and group; metrics come with half the width of their 95 % interval.

    Args:
        only: metrics to show; all by default.
    """
    found = dict.fromkeys(name for evaluation in named.values() for name in evaluation.overall.metrics)
    metrics = [name for name in found if name in (only or found)]
    table = Table(title="Evaluation (%, ± half-width of the 95 % interval)")
    several = len(named) > 1
    for heading in (["set"] if several else []) + ["group"]:
        table.add_column(heading)
    for heading in ["rows", "errors", "retrieved", *(TITLES.get(m, m) for m in metrics), "IsRel AUC", "IsSup AUC"]:
        table.add_column(heading, justify="right")
    for name, evaluation in named.items():
        groups = dict(evaluation.by_group)
        if len(groups) > 1:
            groups["all"] = evaluation.overall
        for group, figures in groups.items():
            cells = _format_figures(figures, metrics)
            table.add_row(*([name] if several else []), group, *cells, end_section=group == list(groups)[-1])
    return table


def _format_figures(figures: Figures, metrics: list[str]) -> list[str]:
    retrieved = "–" if figures.retrieval_rate is None else f"{100 * figures.retrieval_rate:.1f}"
    areas = [_format_auc(figures.isrel), _format_auc(figures.issup)]
    estimates = [_format_percent(figures.metrics.get(metric)) for metric in metrics]
    return [f"{figures.rows:,}", f"{figures.errors:,}", retrieved, *estimates, *areas]


def _format_auc(judged: Calibration | None) -> str:
    return "–" if judged is None else f"{judged.auc:.3f}"


def _format_percent(found: Estimate | None) -> str:
    return "–" if found is None else f"{100 * found.mean:.1f} ±{50 * (found.high - found.low):.1f}"


def build_differences_table(main: Evaluation, baselines: Mapping[str, Evaluation]) -> Table:
    """Return a table of the set's metrics minus each baseline's, over the rows that both sets have."""
    table = Table(title="Difference from each baseline (percentage points, 95 % interval, paired permutation test)")
    for heading in ("baseline", "metric", "rows", "difference", "interval", "p"):
        table.add_column(heading, justify="left" if heading in ("baseline", "metric") else "right")
    for name, other in baselines.items():
        for metric, found in main.compare_with(other).items():
            interval = f"{100 * found.low:+.1f} … {100 * found.high:+.1f}"
            p_value = f"{found.p_value:.4f}" if found.p_value >= 0.001 else "< 0.001"
            table.add_row(
                name, TITLES.get(metric, metric), f"{found.rows:,}", f"{100 * found.mean:+.1f}", interval, p_value
            )
    return table


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
    console = Console()
    console.print(build_comparison_table(evaluated))
    for table in build_sweep_tables(found) if found else []:
        console.print(table)
    if others:
        console.print(build_differences_table(main, others))


def build_sweep_tables(found: Sweep) -> list[Table]:
    """Return two tables: each setting's best and worst value, and the recommended settings."""
    curves = Table(title=f"Sweep: {found.metric} (%), one setting at a time")
    for heading in ("setting", "best", "", "worst", ""):
        curves.add_column(heading, justify="left" if heading == "setting" else "right")
    for key, points in found.curves.items():
        ordered = sorted(points, key=lambda point: point.score)
        best, worst = ordered[-1], ordered[0]
        curves.add_row(key, str(best.value), f"{100 * best.score:.1f}", str(worst.value), f"{100 * worst.score:.1f}")
    advice = Table(title="Recommended settings (chosen on one half of the rows, measured on the other)")
    for heading in ("settings", "run", "recommended", "difference", "p"):
        advice.add_column(heading, justify="left" if heading == "settings" else "right")
    settings = "\n".join(f"--set decoding.{key}={value}" for key, value in found.recommended.items())
    interval = f"({100 * found.difference.low:+.1f} … {100 * found.difference.high:+.1f})"
    advice.add_row(
        settings or "the run's own",
        f"{100 * found.before.mean:.1f}",
        f"{100 * found.after.mean:.1f}",
        f"{100 * found.difference.mean:+.1f} {interval}",
        f"{found.difference.p_value:.3f}",
    )
    return [curves, advice]


if __name__ == "__main__":
    run(evaluate)
