"""The console script ``selfrag``: every job as a command, ``selfrag annotate`` for ``python -m jobs.annotate``.

A job's module is imported when it is called, so that the list of commands costs nothing.
"""

from importlib import import_module

import typer

JOBS = {
    "import_queries": "Datasets and files to a query set.",
    "annotate": "Queries to answers with evidence and critique.",
    "build_index": "Passages to a FAISS index.",
    "benchmark": "A row's cost beside other implementations' shapes and the bare engine.",
    "benchmark_scaling": "How a run grows with its rows and its actors.",
    "benchmark_index": "The index beside the bare encoder and bare FAISS.",
    "share": "A dataset card for an annotated set, and its way to the Hugging Face hub.",
    "evaluate": "Compare annotated answers with gold answers.",
    "report": "A page about an annotated set: speed, cost, scores, examples.",
    "teach": "Teach a language model the reflection tokens.",
    "demo": "The embedded default, start to end.",
}
# Options, --help included, are the job's own.
PASS_ALL = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}

app = typer.Typer(
    help="Offline Self-RAG at scale. Each command is also a module: python -m jobs.NAME.",
    no_args_is_help=True,
    add_completion=False,
)


def call(job: str, arguments: list[str]) -> None:
    """Run the function of the same name in ``jobs.JOB`` as a command of its own."""
    command = typer.Typer(add_completion=False)
    command.command()(getattr(import_module(f"jobs.{job}"), job))
    command(args=arguments, prog_name=f"selfrag {job.replace('_', '-')}")


def mount(job: str, summary: str) -> None:
    """Make a job a command of the app, under its name with hyphens and under the module's own."""

    def command(context: typer.Context) -> None:
        call(job, context.args)

    shown = job.replace("_", "-")
    for name in sorted({shown, job}):
        app.command(name, help=summary, hidden=name != shown, context_settings=PASS_ALL)(command)


for _job, _summary in JOBS.items():
    mount(_job, _summary)


if __name__ == "__main__":
    app()
