import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import typer
from typer.testing import CliRunner

from jobs.evaluate import evaluate
from tests.jobs.test_rescore import annotated_set

APP = typer.Typer()
APP.command()(evaluate)


def test_sweep_writes_curves_and_recommends_settings(tmp_path: Path) -> None:
    run = annotated_set(tmp_path / "run", keep_candidates=True, explore=True)
    result = CliRunner().invoke(APP, ["--annotations", str(run), "--sweep", str(tmp_path / "sweep")])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert found["metric"] == "accuracy, match"
    assert [point["value"] for point in found["curves"]["constraint"]] == ["none", "no_contradiction", "full_support"]
    rates = [point["retrieval_rate"] for point in found["curves"]["threshold"]]
    assert (rates[0], rates[-1]) == (1.0, 0.0)
    assert rates == sorted(rates, reverse=True)
    drawing = ElementTree.parse(tmp_path / "sweep" / "sweep.svg")
    assert len([node for node in drawing.iter() if (node.get("id") or "").startswith("axes_")]) == 5
    assert "Recommended settings (chosen on one half" in result.stdout


def test_threshold_is_swept_only_with_exploration(tmp_path: Path) -> None:
    run = annotated_set(tmp_path / "run", keep_candidates=True)
    assert CliRunner().invoke(APP, ["--annotations", str(run), "--sweep", str(tmp_path / "sweep")]).exit_code == 0
    assert "threshold" not in json.loads((tmp_path / "sweep" / "sweep.json").read_text())["curves"]


@pytest.mark.parametrize(
    ("candidates", "problem"), [(True, "no manifest of a run"), (False, "the run recorded no candidates")]
)
def test_sets_that_cannot_be_swept_are_refused(tmp_path: Path, candidates: bool, problem: str) -> None:
    run = annotated_set(tmp_path / "run", rows=2, keep_candidates=candidates)
    if candidates:
        (run / "_manifest.json").unlink()
    result = CliRunner().invoke(APP, ["--annotations", str(run), "--sweep", str(tmp_path / "sweep")])
    assert result.exit_code == 2
    assert problem in result.stderr
