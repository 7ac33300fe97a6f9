"""Sweeps weights, thresholds and constraints over the recorded candidates of one run (paper, figure 3).

Settings are chosen on one half of the rows; their score is reported on the other half.
"""

import asyncio
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.config.loading import assign
from pipeline.config.sections import DecodingConfig
from pipeline.evaluation.evaluate import iterate_rows
from pipeline.evaluation.judging import list_golds, list_short_golds, score
from pipeline.evaluation.rescoring import Recorded, Rescoring, supports_any_threshold, to_recorded
from pipeline.evaluation.statistics import Difference, Estimate, compare, estimate, mean
from pipeline.output.folder import OutputFolder
from pipeline.storage.location import Location

THRESHOLDS = tuple(n / 20 for n in range(21))
WEIGHTS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
GRID: Mapping[str, Sequence[Any]] = {
    "threshold": THRESHOLDS,
    "weights.relevance": WEIGHTS,
    "weights.support": WEIGHTS,
    "weights.utility": WEIGHTS,
    "weights.sequence": WEIGHTS,
    "constraint": ("none", "no_contradiction", "full_support"),
}


@dataclass(frozen=True)
class GradedRow:
    """An annotated row with gold answers.

    Attributes:
        id: id of the row.
        recorded: decoding that the row records.
        gold: gold columns of the row.
        metric: metric that the row is graded by.
        choices: closed set of answers; empty for open questions.
        config: decoding settings of the run.
        scores: scores by answer, cached.
    """

    id: str
    recorded: Recorded
    gold: Mapping[str, Any]
    metric: str
    choices: tuple[str, ...]
    config: DecodingConfig
    scores: dict[str, float] = field(default_factory=dict)

    def score(self, answer: str) -> float:
        """Return the metric of an answer; cached, since most settings lead to the same few answers."""
        if answer not in self.scores:
            self.scores[answer] = score({**self.gold, "answer": answer}, self.metric)
        return self.scores[answer]


@dataclass(frozen=True)
class Point:
    """The effect of one value of a setting, with all other settings as in the run.

    Attributes:
        value: value of the setting.
        score: mean over the rows of the metrics of their tasks.
        retrieval_rate: share of the rows answered with a passage.
    """

    value: Any
    score: float
    retrieval_rate: float


@dataclass(frozen=True)
class Sweep:
    """The outcome of a sweep.

    Attributes:
        metric: comma-separated names of the metrics that the scores average.
        curves: points by setting.
        recommended: settings that differ from the run's, chosen on one half of the rows.
        before, after: scores of the other half with the run's settings and with the recommended ones.
        difference: paired difference of ``after`` minus ``before``.
    """

    metric: str
    curves: dict[str, list[Point]]
    recommended: dict[str, Any]
    before: Estimate
    after: Estimate
    difference: Difference


def to_graded_row(row: Mapping[str, Any], rescoring: Rescoring, metrics: Mapping[str, str]) -> GradedRow | None:
    """Convert an annotated row for a sweep; None if it has no gold answers for its metric.

    Args:
        row: annotated row.
        rescoring: settings of the run.
        metrics: headline metric by task; ``""`` stands for rows without one.

    Raises:
        ValueError: the run did not keep its candidates.
    """
    config, choices = rescoring.get_settings(row)
    gold = {name: row.get(name) for name in ("answers", "short_answers")}
    metric = "accuracy" if choices else metrics[row.get(rescoring.columns.task) or ""]
    if not (list_short_golds(gold) if metric == "str_em" else list_golds(gold)):
        return None
    return GradedRow(row[rescoring.columns.id], to_recorded(row), gold, metric, choices, config)


def change_config(config: DecodingConfig, settings: Mapping[str, Any]) -> DecodingConfig:
    """Return the configuration with some settings changed.

    Args:
        config: configuration to change.
        settings: values by dotted key.
    """
    tree = config.model_dump()
    for key, value in settings.items():
        assign(tree, key, value)
    return DecodingConfig.model_validate(tree)


async def _grade(examples: Sequence[GradedRow], settings: Mapping[str, Any]) -> tuple[dict[str, float], float]:
    """Compute scores by id and the retrieval rate under other settings."""
    configs: dict[DecodingConfig, DecodingConfig] = {}
    scores, retrieved = {}, []
    for example in examples:
        if example.config not in configs:
            configs[example.config] = change_config(example.config, settings)
        answer = await example.recorded.rechoose(configs[example.config], example.choices)
        scores[example.id] = example.score(answer.answer)
        retrieved.append(answer.retrieved)
    return scores, mean(retrieved) or 0.0


def grade(examples: Sequence[GradedRow], settings: Mapping[str, Any]) -> tuple[dict[str, float], float]:
    """Compute scores by id and the retrieval rate under other settings."""
    return asyncio.run(_grade(examples, settings))


def is_for_choosing(id_: str) -> bool:
    """Whether a row is in the half on which settings are chosen; depends on the digest of its id alone."""
    return hashlib.sha256(id_.encode()).digest()[0] < 128


def sweep(examples: Sequence[GradedRow], keys: Sequence[str]) -> Sweep:
    """Try every value of every setting, and recommend a combination.

    Args:
        examples: rows with gold answers.
        keys: keys of :data:`GRID`; ``threshold`` needs a run that explored.

    Raises:
        ValueError: there are too few rows for two halves.
    """
    chosen_on = [example for example in examples if is_for_choosing(example.id)]
    reported_on = [example for example in examples if not is_for_choosing(example.id)]
    if len(chosen_on) < 2 or len(reported_on) < 2:
        raise ValueError(f"{len(examples)} rows with gold answers are too few for a sweep")
    curves = {key: _measure_curve(examples, key) for key in keys}
    recommended = _recommend(chosen_on, keys)
    before, after = grade(reported_on, {})[0], grade(reported_on, recommended)[0]
    difference = compare(after, before)
    assert difference is not None
    metric = ", ".join(sorted({example.metric for example in examples}))
    ends = estimate(list(before.values())), estimate(list(after.values()))
    return Sweep(metric, curves, recommended, *ends, difference)


def _measure_curve(examples: Sequence[GradedRow], key: str) -> list[Point]:
    return [_measure_point(examples, key, value) for value in GRID[key]]


def _measure_point(examples: Sequence[GradedRow], key: str, value: Any) -> Point:
    scores, rate = grade(examples, {key: value})
    return Point(value, sum(scores.values()) / len(scores), rate)


def _recommend(examples: Sequence[GradedRow], keys: Sequence[str]) -> dict[str, Any]:
    """Choose settings greedily, one after another: the best value of each if it improves the score so far."""
    settings: dict[str, Any] = {}
    best = sum(grade(examples, settings)[0].values())
    for key in keys:
        scores = {value: sum(grade(examples, {**settings, key: value})[0].values()) for value in GRID[key]}
        value = max(scores, key=lambda v: scores[v])
        if scores[value] > best:
            settings, best = {**settings, key: value}, scores[value]
    return settings


# Enough to resolve two points of accuracy; each row is rescored at most a hundred times.
MOST_ROWS = 5_000


def sweep_set(folder: Location, task: str | None = None) -> Sweep:
    """Sweep over the first ``MOST_ROWS`` rows with gold answers of an annotated set, or of one of its tasks.

    Raises:
        ValueError: the set has no manifest or no candidates, or too few rows have gold answers.
    """
    manifest = OutputFolder(folder).read_manifest()
    if not manifest:
        raise ValueError(f"{folder.uri}: no manifest of a run, which --sweep requires")
    rescoring = Rescoring.of(manifest, {})
    metrics = {name: task["metric"] for name, task in manifest["tasks"].items()}
    columns = rescoring.columns
    read = [columns.id, columns.task, columns.choices, "answers", "short_answers", "retrieve_probability"]
    examples: list[GradedRow] = []
    for row in iterate_rows(folder / "data", [*read, "usage", "candidates", "evidence"], required=[columns.id]):
        if task not in (None, row.get(columns.task)):
            continue
        if (example := to_graded_row(row, rescoring, metrics)) is not None:
            examples.append(example)
        if len(examples) == MOST_ROWS:
            break
    explored = all(supports_any_threshold(example.config.model_dump()) for example in examples)
    return sweep(examples, [key for key in GRID if key != "threshold" or explored])


def save_sweep(found: Sweep, folder: Location) -> None:
    """Write ``sweep.json`` and ``sweep.svg``."""
    (folder / "sweep.json").write(json.dumps(asdict(found), indent=2, ensure_ascii=False).encode())
    (folder / "sweep.svg").write(draw_sweep(found))


def draw_sweep(found: Sweep) -> bytes:
    """Plot the score against the retrieval rate, if δ was swept, and against each weight; returns an SVG."""
    from matplotlib.figure import Figure

    curves = {key: points for key, points in found.curves.items() if key != "constraint"}
    figure = Figure(figsize=(3.2 * len(curves), 3.2), layout="constrained")
    panels: Any = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for panel, (key, points) in zip(panels, curves.items(), strict=True):
        if key == "threshold":
            label = "rows that used a passage (%), δ from 0 to 1"
            across = [100 * point.retrieval_rate for point in points]
        else:
            label = key
            across = [point.value for point in points]
        panel.plot(across, [100 * point.score for point in points], marker="o", markersize=3)
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(f"{found.metric} (%)")
    file = io.BytesIO()
    figure.savefig(file, format="svg")
    return file.getvalue()
