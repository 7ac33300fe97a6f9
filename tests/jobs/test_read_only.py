"""Commands whose output lies in a folder of another user."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from jobs.cli import app
from tests.support.folders import make_read_only


@pytest.mark.parametrize("output", ["locked", "locked/set"])
@pytest.mark.parametrize(
    "command",
    [
        ["annotate", "--dry-run", "--queries", "{}/queries.parquet", "--model", "demo"],
        ["annotate", "--queries", "{}/queries.parquet", "--model", "demo"],
        ["import-queries", "--source", "{}/queries.parquet"],
        ["build-index", "--passages", "{}/queries.parquet"],
    ],
    ids=["dry run", "run", "import", "index"],
)
def test_folder_that_cannot_be_written_to_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], output: str
) -> None:
    pq.write_table(pa.table({"id": ["a"], "query": ["Who?"]}), tmp_path / "queries.parquet")
    (tmp_path / "locked").mkdir()
    make_read_only(tmp_path / "locked", monkeypatch)
    words = [*(word.format(tmp_path) for word in command), "--output", f"{tmp_path}/{output}"]
    result = CliRunner().invoke(app, words)
    assert (result.exit_code, result.stderr) == (
        2,
        f"error: --output {tmp_path}/{output}: this user cannot create files in {tmp_path}/locked; "
        "choose another output, or change its permissions\n",
    )
    assert not list((tmp_path / "locked").iterdir())
