"""The sweep of ``jobs.evaluate --sweep``: read a run's candidates, try other settings, draw and recommend."""

import io
import json
from dataclasses import asdict
from typing import Any

from rich.table import Table

from pipeline.evaluation.evaluate import rows_of
from pipeline.evaluation.rescoring import Rescoring, any_threshold
from pipeline.evaluation.sweep import GRID, Example, Sweep, example_of, sweep
from pipeline.output.folder import OutputFolder
from pipeline.storage.location import Location

# Enough to tell two points of accuracy apart; each row is chosen again a hundred times at most.
MOST_ROWS = 5_000


def sweep_set(folder: Location, task: str | None = None) -> Sweep:
    """Sweep over the first rows of an annotated set, or of one of its tasks, that have gold answers.

    Raises:
        ValueError: the set has no manifest or no candidates, or too few rows have gold answers.
    """
    manifest = OutputFolder(folder).manifest()
    if not manifest:
        raise ValueError(f"{folder.uri}: no manifest of a run, which --sweep needs")
    rescoring = Rescoring.of(manifest, {})
    metrics = {name: task["metric"] for name, task in manifest["tasks"].items()}
    columns = rescoring.columns
    read = [columns.id, columns.task, columns.choices, "answers", "short_answers", "retrieve_probability"]
    examples: list[Example] = []
    for row in rows_of(folder / "data", [*read, "usage", "candidates", "evidence"], required=[columns.id]):
        if task not in (None, row.get(columns.task)):
            continue
        if (example := example_of(row, rescoring, metrics)) is not None:
            examples.append(example)
        if len(examples) == MOST_ROWS:
            break
    explored = all(any_threshold(example.config.model_dump()) for example in examples)
    return sweep(examples, [key for key in GRID if key != "threshold" or explored])


def save(found: Sweep, folder: Location) -> None:
    """Write ``sweep.json`` and ``sweep.svg``."""
    (folder / "sweep.json").write(json.dumps(asdict(found), indent=2, ensure_ascii=False).encode())
    (folder / "sweep.svg").write(drawing(found))


def drawing(found: Sweep) -> bytes:
    """Score against retrieval rate where δ was swept, and against each weight: an SVG."""
    from matplotlib.figure import Figure

    curves = {key: points for key, points in found.curves.items() if key != "constraint"}
    figure = Figure(figsize=(3.2 * len(curves), 3.2), layout="constrained")
    panels: Any = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for panel, (key, points) in zip(panels, curves.items(), strict=True):
        by_rate = key == "threshold"
        across = [100 * point.retrieval_rate if by_rate else point.value for point in points]
        panel.plot(across, [100 * point.score for point in points], marker="o", markersize=3)
        panel.set_xlabel("rows that used a passage (%), δ from 0 to 1" if by_rate else key)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(f"{found.metric} (%)")
    file = io.BytesIO()
    figure.savefig(file, format="svg")
    return file.getvalue()


def tables(found: Sweep) -> list[Table]:
    """Each setting's best and worst value, and the recommendation."""
    curves = Table(title=f"Sweep: {found.metric} (%), one setting at a time")
    for heading in ("setting", "best", "", "worst", ""):
        curves.add_column(heading, justify="left" if heading == "setting" else "right")
    for key, points in found.curves.items():
        ordered = sorted(points, key=lambda point: point.score)
        best, worst = ordered[-1], ordered[0]
        curves.add_row(key, str(best.value), f"{100 * best.score:.1f}", str(worst.value), f"{100 * worst.score:.1f}")
    advice = Table(title="Recommended on one half of the rows, measured on the other")
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
