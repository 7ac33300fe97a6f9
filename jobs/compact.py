"""Rewrite the many files of a finished annotated set as few, in the order of the queries.

``python -m jobs.compact --annotations URI [--output URI] [--file-mb 128]``

On a local disk the set is replaced in one step. An object store cannot replace several files at once, so the compacted
set needs a folder of its own there.
"""

import dataclasses
import json
from typing import Annotated

import typer

from jobs.common import RunFile, StorageSettings, checking, start_logging, working
from jobs.shell import run
from pipeline.config.run import load_storage
from pipeline.output.compacting import compact_set
from pipeline.output.compaction_plan import plan_compaction
from pipeline.storage.lease import OutputInUseError


def compact(
    annotations: Annotated[str, typer.Option(help="Folder of a finished annotated set.")],
    output: Annotated[
        str | None, typer.Option(help="Folder for the compacted set; without it, the set is replaced.")
    ] = None,
    file_mb: Annotated[
        int, typer.Option(min=1, max=4096, help="Size of a file in megabytes, which must fit in memory.")
    ] = 128,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a machine-readable summary on stdout.")] = False,
    config: RunFile = None,
    settings: StorageSettings = None,
) -> None:
    """Rewrite a finished annotated set as few files, in the order of the queries.

    Run the same command again to continue an interrupted compaction.
    Exit status: 0 compacted, 1 failed, 2 bad usage.
    """
    start_logging(progress=["pipeline.output.compacting"], timestamps=True)
    with checking():
        if overwrite and output is None:
            raise ValueError("--overwrite concerns --output, which is missing; without it, the set is replaced anyway")
        plan = plan_compaction(annotations, output, file_mb, load_storage(config, settings or []), overwrite)
    if dry_run:
        typer.echo(
            f"to do    {len(plan.before)} data files into {len(plan.files)}; nothing was written (--dry-run)", err=True
        )
        return
    with working(bad_input=(OutputInUseError,), resumable=True, overwrite=overwrite):
        done = compact_set(plan)
    if plan.done:
        typer.echo(f"{done.output} is compacted already; nothing to do", err=True)
    files = f"{done.rows} rows, {done.files} data files instead of {done.before}"
    typer.echo(f"{files}; annotated set: {done.output}", err=True)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(done)))


if __name__ == "__main__":
    run(compact)
