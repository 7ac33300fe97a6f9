"""Choosing again through the command: an annotated set in, another one out."""

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner, Result

from jobs.annotate import annotate
from jobs.rescore import rescore as command
from pipeline.config.run import RunConfig
from pipeline.config.sections import Profile, StorageConfig
from pipeline.decoding.profiles import Tasks
from pipeline.decoding.reflection_reader import ReflectionCritic
from pipeline.decoding.self_rag import SelfRag
from pipeline.output.folder import OutputFolder
from pipeline.run.annotation import annotate_table
from pipeline.storage.location import locate
from tests.support.fakes import DrawingGenerator, DrawingRetriever, word_tokenizer

APP = typer.Typer()
APP.command()(command)
UNITS = ["0" * 20, "1" * 20]
TASKS = {"label": Profile(choices=("yes", "no"))}


def annotated_set(folder: Path, rows: int = 20, **decoding: Any) -> Path:
    """What a run leaves: two units, the last row of each with an empty query."""
    config = RunConfig.model_validate(
        {"queries": "q", "output": "o", "model": {"name": "m"}, "decoding": decoding, "profiles": TASKS}
    )
    tokenizer = word_tokenizer()
    tasks = Tasks(config.decoding, config.profiles)
    rag = SelfRag(
        DrawingGenerator(tokenizer, random.Random(0), ("yes", "no", "w1")),
        ReflectionCritic(tokenizer),
        tasks,
        DrawingRetriever(),
    )
    output = OutputFolder(locate(str(folder), StorageConfig()))
    for unit in UNITS:
        queries = [f"Tell {unit[0]} {n}" for n in range(rows - 1)] + [""]
        table = pa.table(
            {
                "id": [f"{unit[0]}-{n}" for n in range(rows)],
                "query": queries,
                "task": ["label", None] * (rows // 2),
                "answers": [["yes"], ["w1"]] * (rows // 2),
            }
        )
        found = asyncio.run(annotate_table(rag, table, config))
        output.write_unit(unit, found, table.schema, config.decoding.keep_candidates)
    output.finish(
        {
            "configuration": config.to_record(),
            "settings": config.get_fixed_settings(),
            "tasks": {"": {"rows": rows, **tasks.describe("")}, "label": {"rows": rows, **tasks.describe("label")}},
            "units": {unit: {"rows": rows, "errors": 1} for unit in UNITS},
            "counts": {"rows": 2 * rows, "errors": 2, "retrieved": -1},
        }
    )
    return folder


def rescore(run: Path, output: Path, *settings: str) -> Result:
    flags = [word for setting in settings for word in ("--set", setting)]
    return CliRunner().invoke(APP, ["--annotations", str(run), "--output", str(output), *flags])


def read(folder: Path) -> list[dict[str, Any]]:
    return list(pa.concat_tables(map(pq.read_table, sorted((folder / "data").glob("*")))).to_pylist())


def test_same_settings_reproduce_the_set_and_new_ones_change_it(tmp_path: Path) -> None:
    run = annotated_set(tmp_path / "run", keep_candidates=True, explore=True)
    assert rescore(run, tmp_path / "same").exit_code == 3  # as the run: some rows are in errors/
    assert read(tmp_path / "same") == read(run)

    result = rescore(run, tmp_path / "never", "decoding.threshold=1.0", "decoding.weights.sequence=3")
    assert result.exit_code == 3, result.output
    rows = read(tmp_path / "never")
    assert [row["id"] for row in rows] == [row["id"] for row in read(run)]
    assert not any(row["retrieved"] for row in rows)
    assert {row["answer"] for row in rows if row["task"] == "label"} <= {"yes", "no", "w1"}
    manifest = json.loads((tmp_path / "never" / "_manifest.json").read_text())
    assert manifest["settings"]["decoding.threshold"] == 1.0
    assert manifest["settings"]["decoding.weights.sequence"] == 3
    assert manifest["tasks"][""]["decoding"]["weights"] == {
        "sequence": 3.0,
        "relevance": 1.0,
        "support": 1.0,
        "utility": 0.5,
    }
    counts = {"rows": 40, "errors": 2, "retrieved": 0, "output": str(tmp_path / "never")}
    assert (manifest["status"], manifest["counts"]) == ("finished", counts)
    assert manifest["settings"]["rescored"] == str(run)
    assert manifest["configuration"]["decoding"]["threshold"] == 1.0
    assert (tmp_path / "never" / "_SUCCESS").exists()
    errors = sorted((tmp_path / "never" / "errors").glob("*"))
    assert [pq.read_table(file)["error_type"].to_pylist() for file in errors] == [["ValueError"]] * 2


@pytest.mark.parametrize(
    ("decoding", "setting", "problem"),
    [
        ({"keep_candidates": True}, "decoding.passages=3", "decoding.passages cannot be changed without generating"),
        ({"keep_candidates": True}, "decoding.threshold=0.9", "requires a run with decoding.explore=true"),
        ({}, "decoding.weights.support=2", "recorded no candidates"),
        ({"keep_candidates": True}, "model.name=x", "only decoding.* can be set here"),
        ({"keep_candidates": True}, "decoding.weights=2", "decoding.weights: expected nested settings"),
        ({"keep_candidates": True, "explore": True, "segments": 3}, "decoding.threshold=0.9", "answers of one segment"),
        ({"keep_candidates": True}, "decoding.weights.support=-1", "key decoding.weights.support: input should be"),
    ],
)
def test_settings_that_rescoring_cannot_change_are_refused(
    tmp_path: Path, decoding: dict[str, Any], setting: str, problem: str
) -> None:
    run = annotated_set(tmp_path / "run", rows=2, **decoding)
    result = rescore(run, tmp_path / "new", setting)
    assert result.exit_code == 2
    assert problem in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_unfinished_run_is_refused(tmp_path: Path) -> None:
    run = annotated_set(tmp_path / "run", rows=2, keep_candidates=True)
    (run / "_SUCCESS").unlink()
    assert "not a finished annotated set" in rescore(run, tmp_path / "new").stderr


def test_occupied_output_is_refused(tmp_path: Path) -> None:
    run = annotated_set(tmp_path / "run", rows=2, keep_candidates=True)
    for inside in (run, run / "data"):
        assert "one contains the other" in rescore(run, inside).stderr
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "file").write_text("mine")
    assert (
        f"contains files that are not part of an annotated set ({tmp_path}/new/file)"
        in rescore(run, tmp_path / "new").stderr
    )
    options = ["--annotations", str(run), "--output", str(tmp_path / "new"), "--overwrite"]
    assert "contains files that are not part of an annotated set" in CliRunner().invoke(APP, options).stderr
    annotated_set(tmp_path / "other", rows=2)
    assert "already contains an annotated set" in rescore(run, tmp_path / "other").stderr


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    run = annotated_set(tmp_path / "run", rows=2, keep_candidates=True)
    result = CliRunner().invoke(APP, ["--annotations", str(run), "--output", str(tmp_path / "new"), "--dry-run"])
    assert result.exit_code == 0
    assert "2 units" in result.stderr
    assert not (tmp_path / "new").exists()


def test_deprecated_rescore_option_works_with_a_hint(tmp_path: Path) -> None:
    run = annotated_set(tmp_path / "run", rows=2, keep_candidates=True)
    app = typer.Typer()
    app.command()(annotate)
    result = CliRunner().invoke(app, ["--rescore", str(run), "--output", str(tmp_path / "new"), "--dry-run"])
    assert result.exit_code == 0, result.output
    assert (
        "annotate --rescore RUN is deprecated and will be removed in version 0.3; use: rescore --annotations RUN"
        in result.stderr
    )
    assert "nothing was written" in result.stderr
    result = CliRunner().invoke(app, ["--rescore", str(run), "--output", str(tmp_path / "new"), "--model", "demo"])
    assert result.exit_code == 2
    assert not (tmp_path / "new").exists()
