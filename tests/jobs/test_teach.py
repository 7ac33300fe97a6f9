"""The command on a tiny base model: from a CSV file to a model folder with its card."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

from jobs import teach as module
from jobs.shell import Application
from pipeline.config.sections import ModelConfig
from pipeline.decoding.prompts import PromptTokenizer
from pipeline.engine.models import load_tokenizer
from pipeline.training import measurement, train
from tests.support.students import write_base

SMALL = ["--tokens", "1500", "--step-tokens", "300", "--rank", "2"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), max_position_embeddings=512)


@pytest.fixture(scope="module")
def triples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "triples.csv"
    with file.open("w", newline="", encoding="utf-8") as stream:
        rows = csv.writer(stream)
        rows.writerow(["question", "passage", "answer"])
        for n in range(12):
            rows.writerow(
                [f"Who wrote book {n}?", f"The book number {n} was written by author {n} in Paris.", f"author {n}"]
            )
    return file


def run(*options: Any) -> Result:
    app = Application(add_completion=False)
    app.command()(module.teach)
    return CliRunner().invoke(app, list(map(str, options)))


@pytest.fixture(scope="module")
def taught(base: Path, triples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("taught") / "model"
    result = run("--data", triples, "--base", base, "--output", output, *SMALL)
    assert result.exit_code == 0, result.output
    return output


def test_output_is_a_model_folder_with_its_adapter_and_card(taught: Path, base: Path, triples: Path) -> None:
    assert json.loads((taught / "config.json").read_text())["dtype"] == "bfloat16"
    assert (taught / "adapter" / "adapter_model.safetensors").exists()
    PromptTokenizer.of(load_tokenizer(ModelConfig(name=str(taught))), "taught")
    card = (taught / "README.md").read_text()
    assert f"base_model: {base}" in card
    assert "- readings: 11 (1 more held out)" in card
    assert "- step_tokens: 300" in card
    assert not list(taught.parent.glob("*unfinished*"))
    assert not list(taught.rglob("*.pt"))


def test_existing_output_is_refused(taught: Path, base: Path, triples: Path) -> None:
    result = run("--data", triples, "--base", base, "--output", taught, "--resume", *SMALL)
    assert result.exit_code == 2
    assert f"{taught}: exists; choose another --output" in result.output


def test_interrupted_training_continues(
    base: Path, triples: Path, taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["--data", triples, "--base", base, "--output", tmp_path / "model", *SMALL]

    def interrupt(*_args: Any) -> None:
        raise RuntimeError("the machine is gone")

    with monkeypatch.context() as patch:
        patch.setattr(train, "choose_pace", lambda *_args: train.Pace(320, checkpoint_minutes=0.0))
        patch.setattr(measurement, "measure_held_out", interrupt)
        assert run(*command).exit_code == 1
    assert not (tmp_path / "model").exists()
    refused = run(*command)
    assert refused.exit_code == 2
    assert "continue it with --resume" in refused.output
    other = run(*command, "--resume", "--seed", "7")
    assert other.exit_code == 2
    assert "began with seed 0, not 7" in other.output
    assert run(*command, "--resume").exit_code == 0
    ours, theirs = (folder / "adapter" / "adapter_model.safetensors" for folder in (tmp_path / "model", taught))
    assert ours.read_bytes() == theirs.read_bytes()


def test_all_weights_are_trained_on_request(base: Path, triples: Path, tmp_path: Path) -> None:
    result = run("--data", triples, "--base", base, "--output", tmp_path / "model", "--full", *SMALL)
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "model" / "adapter").exists()
    card = (tmp_path / "model" / "README.md").read_text()
    assert "- full: True" in card
    assert "- learning_rate: 2e-05" in card


def test_held_out_rows_are_a_query_set(triples: Path, tmp_path: Path) -> None:
    assert run("--data", triples, "--held-out", tmp_path / "rows.parquet").exit_code == 0
    assert pq.read_table(tmp_path / "rows.parquet").column("task").to_pylist() == ["reading"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "missing"], "missing: not found; --data is a file of readings or a folder with rc.jsonl"),
        (["--full", "--adapter", "some"], "--full trains all weights, so it cannot continue from --adapter"),
        (["--base", "."], "model .: its tokenizer cannot be loaded"),
    ],
)
def test_wrong_options_are_one_line(triples: Path, tmp_path: Path, options: list[str], message: str) -> None:
    result = run("--data", triples, "--output", tmp_path / "model", *options)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
    assert not list(tmp_path.iterdir())
