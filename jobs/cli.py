"""The console script ``selfrag`` with every job as a command: ``selfrag annotate`` is ``python -m jobs.annotate``.

A job's module is imported only when its command is used, so that listing the commands is fast.
"""

import platform
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from pipeline.versions import versions

JOBS = {
    "doctor": "Can this machine or cluster run the job, and what to do where not.",
    "import_queries": "Datasets and files to a query set.",
    "annotate": "Queries to answers with evidence and critique.",
    "build_index": "Passages to a FAISS index.",
    "plan_index": "What an index of your passages takes: bytes, cards, machines, hours.",
    "check_index": "Is an index whole, and which search parameters reach a wanted recall.",
    "rescore": "Choose an annotated set's answers again with other settings, without a model.",
    "benchmark": "A row's cost beside other implementations' shapes and the bare engine.",
    "benchmark_scaling": "How a run grows with its rows and its actors.",
    "benchmark_index": "The index beside the bare encoder and bare FAISS.",
    "benchmark_savings": "What each way of saving work saves.",
    "share": "A dataset card for an annotated set, and its way to the Hugging Face hub.",
    "evaluate": "Compare annotated answers with gold answers.",
    "report": "A page about an annotated set: speed, cost, scores, examples.",
    "teach": "Teach a language model the reflection tokens.",
    "demo": "The embedded default, start to end.",
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
    command.command(name)(getattr(import_module(module_of(job)), job))
    return get_command(command)


def module_of(job: str) -> str:
    """Return the name of a job's module; benchmarks are in ``jobs.benchmark``."""
    if job == "benchmark":
        return "jobs.benchmark.compare"
    return f"jobs.{job.replace('benchmark_', 'benchmark.')}"


def show_versions(wanted: bool) -> None:
    """Print the versions of Python and of the packages that decide results, and exit."""
    if wanted:
        for package, version in {**versions(), "python": platform.python_version()}.items():
            typer.echo(f"{package} {version}")
        raise typer.Exit


app = typer.Typer(cls=Jobs, no_args_is_help=True)


@app.callback()
def selfrag(
    version: Annotated[
        bool, typer.Option("--version", callback=show_versions, is_eager=True, help="Versions of what decides results.")
    ] = False,
) -> None:
    """Offline Self-RAG at scale. Each command is also a module: python -m jobs.NAME."""


for _job, _summary in JOBS.items():
    _shown = _job.replace("_", "-")
    for _name in sorted({_shown, _job}):
        app.command(_name, help=_summary, hidden=_name != _shown)(lambda: None)


if __name__ == "__main__":
    app()
