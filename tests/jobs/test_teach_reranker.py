"""The command on a tiny base model: from a CSV file to a cross-encoder with its card."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from jobs import teach_reranker as module
from jobs.shell import Application
from pipeline.config.sections import RerankConfig
from pipeline.retrieval.reranker import find_reranker
from tests.support.rerankers import write_classifier
from tests.support.triples import write_triples

SMALL = ["--questions", "16", "--passages", "3", "--batch-questions", "4", "--rank", "2"]
NAMES = ["Rollo", "Guiscard", "Tancred", "Edward", "Harold", "Emma", "Bohemond", "Drogo", "Anna", "Sichelgaita"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classifier(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def triples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = ((f"Who led army {n}?", f"The army number {n} was led by {name}.", name) for n, name in enumerate(NAMES))
    return write_triples(tmp_path_factory.mktemp("data") / "triples.csv", rows)


def run(*options: Any) -> Result:
    app = Application(add_completion=False)
    app.command()(module.teach_reranker)
    return CliRunner().invoke(app, list(map(str, options)))


def test_output_is_a_reranker_with_its_adapter_and_card(base: Path, triples: Path, tmp_path: Path) -> None:
    output = tmp_path / "reranker"
    result = run("--data", triples, "--base", base, "--output", output, *SMALL)
    assert result.exit_code == 0, result.output
    folder, _ = find_reranker(RerankConfig(model=str(output)))
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["r"] == 2
    card = (output / "README.md").read_text()
    assert f"base_model: {base}" in card
    assert "16 questions, drawn from 9 readings and 0 questions with a sentence." in card
    assert "On 1 held-out questions:" in card
    assert "- right passage first: " in card
    assert not list(tmp_path.glob("*unfinished*"))
    again = run("--data", triples, "--base", base, "--output", output, *SMALL)
    assert (again.exit_code, again.output.count("exists; choose another --output")) == (2, 1)


def test_base_that_does_not_suit_is_refused_before_passages_are_mined(
    triples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "mine_parts", lambda *_: pytest.fail("mined"))
    (tmp_path / "empty").mkdir()
    result = run("--data", triples, "--base", tmp_path / "empty", "--output", tmp_path / "out", *SMALL)
    assert result.exit_code == 2
    assert "cannot be loaded as a classifier" in result.output
