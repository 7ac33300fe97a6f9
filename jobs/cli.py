"""The console script ``selfrag`` with every job as a command: ``selfrag annotate`` is ``python -m jobs.annotate``.

A job's module is imported only when its command is used, so that listing the commands is fast.
"""

import platform
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from jobs.shell import Application
from pipeline.versions import read_versions

JOBS = {
    "doctor": "Check whether this machine or cluster can run the job, and suggest fixes.",
    "import_queries": "Convert datasets and files to a query set.",
    "build_index": "Build a FAISS index of passages.",
    "update_index": "Add passages to an index and remove others, without building it anew.",
    "plan_index": "Estimate what an index of your passages takes: bytes, GPUs, machines, hours.",
    "check_index": "Check that an index is intact, and find the search parameters for a target recall.",
    "tune": "Find the engine's fastest settings for a run, on a sample of its rows.",
    "annotate": "Annotate queries with answers, evidence and critique.",
    "verify": "Verify that an annotated set is whole: every page, every query once.",
    "publish": "Register an annotated set in a Delta or Iceberg table, once.",
    "compact": "Rewrite the files of an annotated set as few, in the order of the queries.",
    "rescore": "Rescore an annotated set with other settings, without a model.",
    "evaluate": "Compare annotated answers with gold answers.",
    "report": "Write an HTML report on an annotated set: speed, cost, scores, examples.",
    "share": "Write a dataset card, and upload an annotated set to the Hugging Face hub.",
    "demo": "Run the built-in example from start to end.",
    "teach": "Train a language model to write the reflection tokens.",
    "teach_reranker": "Train a cross-encoder that orders the passages of a search.",
    "benchmark": "Compare speed with other implementations' request patterns and the bare engine.",
    "benchmark_scaling": "Measure how a run scales with its rows and its actors.",
    "benchmark_index": "Compare the index with the bare encoder, FAISS and reranker.",
    "benchmark_words": "Compare the search by words with bare bm25s, and the fused search with both.",
    "benchmark_savings": "Measure what each optimization saves.",
}


class Jobs(TyperGroup):
    """The group of all jobs; a job's module is imported when its command is called, or completed in a shell."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Return the name and the command that the arguments select, and the remaining arguments."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, command and load_command(name or ""), rest


def load_command(name: str) -> Any:
    """Import a job's module and make a command of its function of the same name."""
    job = name.replace("-", "_")
    command = typer.Typer(add_completion=False)
    command.command(name)(getattr(import_module(find_module(job)), job))
    return get_command(command)


def find_module(job: str) -> str:
    """Return the name of a job's module; benchmarks are in ``jobs.benchmark``."""
    if job == "benchmark":
        return "jobs.benchmark.compare"
    return f"jobs.{job.replace('benchmark_', 'benchmark.')}"


def show_versions(wanted: bool) -> None:
    """Print the versions of Python and of the packages that decide results, and exit."""
    if wanted:
        for package, version in {**read_versions(), "python": platform.python_version()}.items():
            typer.echo(f"{package} {version}")
        raise typer.Exit


app = Application(cls=Jobs, no_args_is_help=True)


@app.callback()
def selfrag(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=show_versions,
            is_eager=True,
            help="Print the versions of the packages that affect results.",
        ),
    ] = False,
) -> None:
    """Offline Self-RAG at scale. Each command is also a module: python -m jobs.NAME."""


for _job, _summary in JOBS.items():
    _shown = _job.replace("_", "-")
    for _name in sorted({_shown, _job}):
        app.command(_name, help=_summary, hidden=_name != _shown)(lambda: None)


if __name__ == "__main__":
    app()
