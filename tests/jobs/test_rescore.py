"""Choosing again through the command: an annotated set in, another one out."""

import asyncio
import dataclasses
import json
import random
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import typer
from typer.testing import CliRunner, Result

from jobs.annotate import annotate
from jobs.rescore import rescore as command
from pipeline.config.run import RunConfig
from pipeline.config.sections import Profile, StorageConfig
from pipeline.decoding.profiles import Tasks
from pipeline.decoding.reflection_reader import ReflectionCritic
from pipeline.decoding.self_rag import SelfRag
from pipeline.evaluation import rescored_set
from pipeline.output.compacting import compact_set
from pipeline.output.compaction_plan import plan_compaction
from pipeline.output.folder import OutputFolder
from pipeline.output.unit_files import split_failed
from pipeline.output.unit_log import read_units, write_units
from pipeline.run.annotation import annotate_table
from pipeline.storage.lease import Lease
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
    output, units = OutputFolder(locate(str(folder), StorageConfig())), []
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
        units.append(output.write_unit(unit, *split_failed(found, table.schema, config.decoding.keep_candidates), ""))
    output.finish(
        {
            "configuration": config.to_record(),
            "settings": config.get_fixed_settings(),
            "tasks": {"": {"rows": rows, **tasks.describe("")}, "label": {"rows": rows, **tasks.describe("label")}},
            "counts": {"rows": 2 * rows, "errors": 2, "retrieved": -1},
        },
        units,
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


def test_units_of_a_block_are_rescored_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = annotated_set(tmp_path / "run", keep_candidates=True)
    monkeypatch.setattr(rescored_set, "MOST_BLOCKS", 1)
    made, make = [], ray.data.from_items
    monkeypatch.setattr(ray.data, "from_items", lambda rows, **options: made.append(options) or make(rows, **options))
    assert rescore(run, tmp_path / "same").exit_code == 3
    assert made == [{"override_num_blocks": 1}]
    assert read(tmp_path / "same") == read(run)
    units = read_units(locate(str(tmp_path / "same"), StorageConfig())).values()
    assert [(unit.unit, unit.rows, unit.failed) for unit in units] == [(unit, 20, 1) for unit in UNITS]


def test_compacted_set_is_rescored_unit_by_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.storage.lease.SETTLE_S", 0.01)
    run = annotated_set(tmp_path / "run", keep_candidates=True)
    assert rescore(run, tmp_path / "same").exit_code == 3
    compact_set(plan_compaction(str(tmp_path / "same"), None, 128, StorageConfig(), overwrite=False))
    assert len(list((tmp_path / "same" / "data").iterdir())) == 1
    assert rescore(tmp_path / "same", tmp_path / "again").exit_code == 3
    assert read(tmp_path / "again") == read(run)
    assert "compacted" not in json.loads((tmp_path / "again" / "_manifest.json").read_text())
    units = read_units(locate(str(tmp_path / "again"), StorageConfig())).values()
    assert [(unit.unit, unit.rows, unit.failed) for unit in units] == [(unit, 20, 1) for unit in UNITS]


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


EVIL = ["x/../../../victim/evil", "/etc/passwd", "..", "", "\0" * 20, "A" * 20, "0" * 21, "..\\..\\x", "ö" * 20]


@pytest.mark.parametrize("name", EVIL, ids=range(len(EVIL)))
def test_unit_that_is_not_a_file_of_the_run_is_refused(name: str, tmp_path: Path) -> None:
    run = annotated_set(tmp_path / "run", rows=2, keep_candidates=True)
    folder = locate(str(run), StorageConfig())
    first, second = read_units(folder).values()
    write_units(folder, [first, dataclasses.replace(second, unit=name)])
    result = rescore(run, tmp_path / "new")
    assert result.exit_code == 2
    assert f"{run}/_units.parquet: {name!r} is not the id of a unit" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_damaged_list_of_units_is_refused(tmp_path: Path) -> None:
    run = annotated_set(tmp_path / "run", rows=2, keep_candidates=True)
    for content in (b"", b"PAR1", (run / "data" / f"part-{UNITS[0]}.parquet").read_bytes()):
        (run / "_units.parquet").write_bytes(content)
        result = rescore(run, tmp_path / "new")
        assert result.exit_code == 2
        assert result.stderr.startswith(f"error: {run}/_units.parquet: not a ")
        assert len(result.stderr.splitlines()) == 1


def lose_data(run: Path) -> None:
    (run / "data" / f"part-{UNITS[1]}.parquet").unlink()


def cut_rows(run: Path) -> None:
    file = run / "data" / f"part-{UNITS[1]}.parquet"
    pq.write_table(pq.read_table(file).slice(1), file)


def lose_errors(run: Path) -> None:
    (run / "errors" / f"part-{UNITS[1]}.parquet").unlink()


def cut_bytes(run: Path) -> None:
    file = run / "data" / f"part-{UNITS[1]}.parquet"
    file.write_bytes(file.read_bytes()[:-9])


@pytest.mark.parametrize(
    ("damage", "status", "problem"),
    [
        (lose_data, 2, "1 units are in _units.parquet or in data/, but not in both"),
        (cut_rows, 1, "holds 2 rows instead of 3; selfrag verify names the way to repair the set"),
        (lose_errors, 1, "not found|No such file"),
        (cut_bytes, 1, f"data/part-{UNITS[1]}.parquet: not a readable Parquet file"),
    ],
)
def test_run_with_a_lost_or_damaged_file_is_not_rescored(damage, status: int, problem: str, tmp_path: Path) -> None:
    run = annotated_set(tmp_path / "run", rows=4, keep_candidates=True)
    damage(run)
    result = rescore(run, tmp_path / "new")
    assert result.exit_code == status
    assert re.search(problem, result.stderr.splitlines()[-1])
    assert not (tmp_path / "new" / "_SUCCESS").exists()


def test_output_of_another_run_at_work_is_left_alone(tmp_path: Path) -> None:
    run = annotated_set(tmp_path / "run", rows=2, keep_candidates=True)
    other = annotated_set(tmp_path / "other", rows=2, keep_candidates=True)
    before = read(other)
    options = ["--annotations", str(run), "--output", str(other), "--overwrite"]
    with Lease(locate(str(other), StorageConfig())):
        result = CliRunner().invoke(APP, options)
    assert result.exit_code == 2
    assert "another run is using this output" in result.stderr.splitlines()[-1]
    assert read(other) == before


def test_interrupted_rescoring_is_continued_by_the_same_command(tmp_path: Path) -> None:
    run, new = annotated_set(tmp_path / "run", rows=4, keep_candidates=True), tmp_path / "new"
    settings = "decoding.weights.support=2"
    assert rescore(run, new, settings).exit_code == 3
    (first, second) = (new / "data" / f"part-{unit}.parquet" for unit in UNITS)
    (new / "_SUCCESS").unlink()
    second.unlink()
    kept = first.read_bytes()
    assert "already contains an annotated set" in rescore(run, new).stderr
    assert rescore(run, new, settings).exit_code == 3
    assert first.read_bytes() == kept
    assert [len(pq.read_table(file)) for file in (first, second)] == [3, 3]
    assert (new / "_SUCCESS").exists()
    assert (new / "report.html").exists()


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
    assert result.stderr == "error: --rescore cannot be combined with --queries, --index or --model\n"
    result = CliRunner().invoke(app, ["--rescore", str(run)])
    assert (result.exit_code, result.stderr) == (2, "error: --output is missing\n")
    assert not (tmp_path / "new").exists()
