from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
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
    result = CliRunner().invoke(APP, flags, env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    assert "…" not in result.stdout
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines() if "│" in line]
    assert ["passages", "1,271"] in cells
    assert ["dimensions", "384"] in cells
    # 1,271 passages of 776 bytes, and 128 centroids of 384 numbers of 4 bytes.
    assert ["IVF128,SQfp16", "776", "1.2 MB", "1.2 MB"] in cells
    assert not (tmp_path / "index").exists()


def plan(folder: Path, *flags: str) -> list[list[str]]:
    """The cells of the tables."""
    result = CliRunner().invoke(APP, ["--passages", str(folder), *flags], env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines() if "│" in line]


def test_plan_counts_long_passages_and_their_parts_in_mapped_columns(tmp_path: Path) -> None:
    texts = ["This sentence is about nothing. " * 100, "Short."] * 100
    pq.write_table(pa.table({"docid": range(200), "contents": texts}), tmp_path / "p.parquet")
    columns = ("--column", "id=docid", "--column", "text=contents")
    whole = plan(tmp_path, *columns)
    assert ["passages", "200"] in whole
    assert ["tokens that the encoder reads", "256, some 150 English words"] in whole
    (share,) = [cells[1] for cells in whole if cells[0] == "longer passages"]
    assert 40 < int(share.partition("%")[0]) < 60
    parts = plan(tmp_path, *columns, "--max-words", "100")
    (count,) = [int(cells[1]) for cells in parts if cells[0] == "passages"]
    assert 550 < count < 650  # five parts of each long passage, one of each short one
    assert ["longer passages", "0% of a sample; --max-words splits them"] in parts


def test_unusable_columns_of_a_plan_are_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["a"], "contents": ["x"]}), tmp_path / "p.parquet")
    for flags, problem in (
        ([], "p.parquet: no column text, found id, contents; name another with --column text=COLUMN"),
        (["--column", "text"], "--column text: expected NAME=COLUMN, such as text=contents"),
        (["--max-words", "9", "--embeddings", "v"], "--max-words 9: the vectors of --embeddings v are those of whole"),
    ):
        result = CliRunner().invoke(APP, ["--passages", str(tmp_path), *flags])
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
        assert problem in result.stderr


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
