import subprocess
import sys

import pytest
from typer.testing import CliRunner

from jobs.cli import JOBS, app


def test_help_lists_every_job() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    assert all(job.replace("_", "-") in result.stdout for job in JOBS)


def test_options_and_exit_status_are_the_job_s_own(tmp_path) -> None:
    result = CliRunner().invoke(app, ["evaluate", "--annotations", str(tmp_path)])
    assert result.exit_code == 2
    assert "no Parquet files" in result.stderr


def test_help_of_a_command_is_the_job_s_own() -> None:
    result = CliRunner().invoke(app, ["evaluate", "--help"])
    assert result.exit_code == 0
    assert "--baseline" in result.stdout


@pytest.mark.parametrize("module", ["torch", "ray", "transformers", "pyarrow"])
def test_the_list_of_commands_imports_nothing_heavy(module: str) -> None:
    script = f"import sys, jobs.cli; sys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
