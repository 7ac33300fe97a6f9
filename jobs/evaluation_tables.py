"""Build the tables of an evaluation, which fit a terminal of 80 columns for a few metrics or sets."""

from collections.abc import Collection, Mapping
from itertools import chain

from rich import box
from rich.table import Table

from pipeline.evaluation.evaluate import Evaluation, Figures
from pipeline.evaluation.statistics import Calibration, Estimate
from pipeline.evaluation.sweep import Sweep

TITLES = {"exact_match": "exact", "f1": "F1", "str_em": "str-EM", "rouge_l": "ROUGE-L"}
# Groups that fit side by side, each in a column.
FEW_GROUPS = 4
COMPARISON = "Evaluation (%, ± half-width of the 95 % interval)"


def build_comparison_table(named: Mapping[str, Evaluation], only: Collection[str] = ()) -> Table:
    """Return a table of one set by group, or of several sets with a column for each set.

    Figures that no row has are left out. Metrics come with half the width of their 95 % interval.

    Args:
        named: evaluations by the names of the sets.
        only: metrics to show; all by default.
    """
    found = dict.fromkeys(name for evaluation in named.values() for name in evaluation.overall.metrics)
    metrics = [name for name in found if name in (only or found)]
    cells = {name: _format_groups(evaluation, metrics) for name, evaluation in named.items()}
    return _build_sets_table(cells) if len(cells) > 1 else _build_groups_table(*cells.values())


Cells = dict[str, str]


def _format_groups(evaluation: Evaluation, metrics: list[str]) -> dict[str, Cells]:
    """Return the figures of each group, and of all if there are several, by title."""
    groups = dict(evaluation.by_group)
    if len(groups) > 1:
        groups["all"] = evaluation.overall
    return {name: _format_figures(figures, metrics) for name, figures in groups.items()}


def _format_figures(figures: Figures, metrics: list[str]) -> Cells:
    retrieved = "–" if figures.retrieval_rate is None else f"{100 * figures.retrieval_rate:.1f}"
    cells = {"rows": f"{figures.rows:,}", "errors": f"{figures.errors:,}", "retrieved": retrieved}
    for metric in metrics:
        cells[TITLES.get(metric, metric)] = _format_percent(figures.metrics.get(metric))
    for title, judged in (("IsRel AUC", figures.isrel), ("IsSup AUC", figures.issup)):
        cells[title] = "–" if judged is None else f"{judged.auc:.3f}"
    return cells


def _format_percent(found: Estimate | None) -> str:
    return "–" if found is None else f"{100 * found.mean:.1f} ±{50 * (found.high - found.low):.1f}"


def _is_told(values: Collection[str]) -> bool:
    """Whether values of a figure tell anything: some row has it, and it is not a count of nothing."""
    return not set(values) <= {"–", "0"}


def _build_groups_table(groups: Mapping[str, Cells]) -> Table:
    titles = [title for title in next(iter(groups.values())) if _is_told([cells[title] for cells in groups.values()])]
    table = Table(title=COMPARISON, box=box.SIMPLE_HEAD, pad_edge=False)
    if len(groups) <= FEW_GROUPS:
        table.add_column("figure")
        for name in groups:
            table.add_column(name, justify="right")
        for title in titles:
            table.add_row(title, *(cells[title] for cells in groups.values()))
        return table
    table.add_column("group")
    for title in titles:
        table.add_column(title, justify="right")
    for name, cells in groups.items():
        table.add_row(name, *(cells[title] for title in titles))
    return table


def _build_sets_table(sets: Mapping[str, Mapping[str, Cells]]) -> Table:
    table = Table(title=COMPARISON, box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("group", "figure"):
        table.add_column(heading)
    for name in sets:
        table.add_column(name, justify="right")
    for group in dict.fromkeys(chain.from_iterable(sets.values())):
        present = [groups.get(group, {}) for groups in sets.values()]
        titles = dict.fromkeys(chain.from_iterable(present))
        lines = {title: [cells.get(title, "–") for cells in present] for title in titles}
        told = [title for title, values in lines.items() if _is_told(values)]
        for title in told:
            table.add_row(group if title == told[0] else "", title, *lines[title], end_section=title == told[-1])
    return table


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


def build_reliability_table(title: str, judged: Calibration) -> Table:
    """Return a reliability diagram in figures: for each bin of scores, how often the judgment is true.

    Below it are the calibration error, and what a temperature would change: fitted on one half, measured on the other.
    """
    table = Table(title=f"Reliability of {title}", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("score", "judged", "mean score", "true"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for part in judged.bins:
        bar = "█" * round(20 * part.truth)
        table.add_row(
            f"{part.low:.1f} – {part.high:.1f}", f"{part.judged:,}", f"{part.score:.3f}", f"{part.truth:.3f}", bar
        )
    table.caption = f"calibration error (ECE) {judged.ece:.3f}, Brier score {judged.brier:.3f}"
    if fit := judged.temperature:
        table.caption += (
            f"; temperature {fit.temperature:.2f}, fitted on one half: "
            f"log loss of the other {fit.before:.3f} → {fit.after:.3f}"
        )
    return table


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
