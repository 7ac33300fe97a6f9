"""The command on a tiny base model: from a CSV file to a model folder with its card."""

import json
import subprocess
import sys
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
from tests.support.triples import write_triples

SMALL = ["--tokens", "1500", "--step-tokens", "300", "--rank", "2"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), max_position_embeddings=512)


@pytest.fixture(scope="module")
def triples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = (
        (f"Who wrote book {n}?", f"The book number {n} was written by author {n} in Paris.", f"author {n}")
        for n in range(12)
    )
    return write_triples(tmp_path_factory.mktemp("data") / "triples.csv", rows)


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
    assert "- readings: 11; for the figures: 1" in card
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


def test_training_continues_from_an_adapter_of_its_rank(
    base: Path, triples: Path, taught: Path, tmp_path: Path
) -> None:
    more = ["--adapter", taught / "adapter", "--tokens", "300", "--step-tokens", "300", "--rank", "9", "--workers", "1"]
    result = run("--data", triples, "--base", base, "--output", tmp_path / "model", *more)
    assert result.exit_code == 0, result.output
    assert "- rank: 2\n" in (tmp_path / "model" / "README.md").read_text()
    assert json.loads((tmp_path / "model" / "adapter" / "adapter_config.json").read_text())["r"] == 2


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
        (["--adapter", "nowhere"], "nowhere: no LoRA adapter"),
        (["--base", "."], ": its tokenizer cannot be loaded: "),
    ],
)
def test_wrong_options_are_one_line(triples: Path, tmp_path: Path, options: list[str], message: str) -> None:
    result = run("--data", triples, "--output", tmp_path / "model", *options)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
    assert not list(tmp_path.iterdir())


def test_card_names_the_command_as_it_was_given(
    base: Path, triples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--data", str(triples), "--base", str(base), "--output", str(tmp_path / "model"), *SMALL, "--full"]
    monkeypatch.setattr("sys.argv", ["/venv/bin/selfrag", "teach", *arguments])
    assert run(*arguments).exit_code == 0
    assert f"selfrag teach --data {triples}" in (tmp_path / "model" / "README.md").read_text()


@pytest.mark.slow
def test_taught_model_annotates(triples: Path, tmp_path: Path) -> None:
    """From the file to answers, as infra/TEACHING.md shows it, with the real engine and a model that learned little."""
    model, rows = tmp_path / "model", tmp_path / "rows.parquet"
    assert run("--data", triples, "--output", model, "--tokens", "1500", "--step-tokens", "500").exit_code == 0
    assert run("--data", triples, "--held-out", rows).exit_code == 0
    command = ["--queries", str(rows), "--output", str(tmp_path / "out"), "--model", str(model)]
    command += ["--set", "decoding.max_tokens=20"]
    subprocess.run(
        [sys.executable, "-m", "jobs.annotate", *command, "--set", "decoding.mode=always"], check=True, timeout=500
    )
    (answer,) = pq.read_table(tmp_path / "out" / "data").to_pylist()
    assert (answer["id"], answer["task"]) == ("reading-0", "reading")
    assert answer["usage"]["engine_requests"] >= 1
    assert answer["usage"]["prompt_tokens"] > 0
