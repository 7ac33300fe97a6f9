from rich.console import Console
from rich.table import Table

from jobs.evaluation_tables import build_comparison_table, build_reliability_table
from pipeline.evaluation.evaluate import Evaluation, Tally
from pipeline.evaluation.judging import Judged
from pipeline.evaluation.statistics import Calibration, ReliabilityBin, TemperatureFit

QUESTION = Judged(True, {"match": 1.0, "exact_match": 0.0, "f1": 0.5, "recall@1": 1.0}, ((True, 0.9), (False, 0.2)))
INSTRUCTION = Judged(False, {})


def fill(*rows: Judged) -> Tally:
    tally = Tally()
    for number, row in enumerate(rows):
        tally.add(str(number), row)
    return tally


def show(table: Table) -> list[str]:
    console = Console(width=80, record=True, color_system=None)
    console.print(table)
    return [line.rstrip() for line in console.export_text().splitlines()]


def test_groups_of_one_set_are_columns() -> None:
    groups = {"two_questions": fill(QUESTION), "instruction": fill(INSTRUCTION)}
    lines = [line.split() for line in show(build_comparison_table({"annotations": Evaluation("out", groups)})) if line]
    assert ["figure", "instruction", "two_questions", "all"] in lines
    assert ["rows", "1", "1", "2"] in lines
    assert ["retrieved", "0.0", "100.0", "50.0"] in lines
    assert ["F1", "–", "50.0", "±0.0", "50.0", "±0.0"] in lines
    assert ["IsRel", "AUC", "–", "1.000", "1.000"] in lines
    assert not any("IsSup" in line or "errors" in line for line in lines)  # nothing was judged, nothing failed


def test_many_groups_are_lines() -> None:
    groups = {f"task {n}": fill(QUESTION) for n in range(5)}
    lines = [
        line.split() for line in show(build_comparison_table({"a": Evaluation("out", groups)}, only=["f1"])) if line
    ]
    assert ["group", "rows", "retrieved", "F1", "IsRel", "AUC"] in lines
    assert ["task", "3", "1", "100.0", "50.0", "±0.0", "1.000"] in lines
    assert ["all", "5", "100.0", "50.0", "±0.0", "1.000"] in lines


def test_several_sets_are_columns() -> None:
    adaptive, never = fill(QUESTION, QUESTION), fill(Judged(False, {"match": 0.0}))
    adaptive.errors = 3
    sets = {"adaptive": Evaluation("a", {"qa": adaptive}), "never": Evaluation("b", {"qa": never})}
    lines = [line.split() for line in show(build_comparison_table(sets, only=["match", "recall@1"])) if line]
    assert ["group", "figure", "adaptive", "never"] in lines
    assert ["qa", "rows", "2", "1"] in lines
    assert ["errors", "3", "0"] in lines
    assert ["match", "100.0", "±0.0", "0.0", "±0.0"] in lines
    assert ["recall@1", "100.0", "±0.0", "–"] in lines
    assert ["IsRel", "AUC", "1.000", "–"] in lines
    assert not any("F1" in line or "IsSup" in line for line in lines)


def test_reliability_is_shown_by_score() -> None:
    bins = (ReliabilityBin(0.1, 0.2, 30, 0.15, 0.05), ReliabilityBin(0.9, 1.0, 70, 0.97, 0.75))
    judged = Calibration(0.9, 0.1, 0.184, 100, bins, TemperatureFit(1.834, 0.5, 0.4))
    lines = show(build_reliability_table("IsRel", judged))
    assert ["0.1", "–", "0.2", "30", "0.150", "0.050", "█"] in [line.split() for line in lines]
    assert ["0.9", "–", "1.0", "70", "0.970", "0.750", 15 * "█"] in [line.split() for line in lines]
    caption = " ".join(" ".join(lines).split())
    assert "calibration error (ECE) 0.184, Brier score 0.100" in caption
    assert "temperature 1.83, fitted on one half: log loss of the other 0.500 → 0.400" in caption
