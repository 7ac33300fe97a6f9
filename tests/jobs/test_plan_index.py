from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from jobs.build_index import build_index
from jobs.plan_index import plan_index
from pipeline.retrieval.encoder import Encoder
from tests.conftest import DEMO

APP = typer.Typer()
APP.command()(plan_index)


def test_plan_estimates_sizes_and_writes_nothing(tmp_path: Path) -> None:
    flags = ["--passages", str(DEMO / "passages.parquet"), "--factory", "IVF{lists},SQfp16"]
    result = CliRunner().invoke(APP, flags, env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines() if "│" in line]
    assert ["passages", "1,271"] in cells
    assert ["dimensions", "384"] in cells
    assert ["IVF128,SQfp16", "776", "0.00 GB", "0.00 GB"] in cells
    assert not (tmp_path / "index").exists()


def test_wrong_factory_is_refused_before_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Encoder, "encode")
    flags = ["--passages", str(DEMO / "passages.parquet"), "--factory", "Flatt"]
    result = CliRunner().invoke(APP, flags)
    assert result.exit_code == 2
    assert "factory Flatt" in result.stderr
    assert result.stderr.count("\n") == 1


def test_deprecated_plan_option_works_with_a_hint(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(build_index)
    flags = ["--passages", str(DEMO / "passages.parquet"), "--factory", "SQfp16", "--plan"]
    result = CliRunner().invoke(app, flags, env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    assert "build_index --plan is deprecated and will be removed in version 0.3; use: plan_index" in result.stderr
    assert "SQfp16" in result.stdout
