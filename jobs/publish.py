"""Register a finished annotated set in a Delta or Iceberg table, without copying its files.

``python -m jobs.publish --annotations URI [--delta URI] [--iceberg CATALOG.NAMESPACE.TABLE]``

Repeating it adds nothing twice. ``jobs.annotate`` does the same at its end if ``publish`` is configured.
"""

import dataclasses
import json
from typing import Annotated

import typer

from jobs.common import RunFile, StorageSettings, checking, start_logging, working
from jobs.shell import run
from pipeline.config.run import load_storage
from pipeline.config.sections import PublishConfig
from pipeline.output.folder import OutputFolder
from pipeline.publishing.publish import check_publishing, publish_set
from pipeline.publishing.published_set import FinishedFiles
from pipeline.storage.lease import OutputInUseError
from pipeline.storage.location import locate


def publish(
    annotations: Annotated[str, typer.Option(help="Folder of a finished annotated set.")],
    delta: Annotated[str | None, typer.Option(help="URI of a Delta table, a folder above the set.")] = None,
    iceberg: Annotated[str | None, typer.Option(help="Iceberg table, as CATALOG.NAMESPACE.TABLE.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and write nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a machine-readable summary on stdout.")] = False,
    config: RunFile = None,
    settings: StorageSettings = None,
) -> None:
    """Register a finished annotated set in a Delta or Iceberg table, once.

    Exit status: 0 published or published before, 1 failed, 2 bad usage.
    """
    start_logging(timestamps=True)
    with checking():
        tables = PublishConfig(delta=delta, iceberg=iceberg)
        if tables == PublishConfig():
            raise ValueError("give --delta or --iceberg, or both")
        storage = load_storage(config, settings or [])
        found = FinishedFiles.of(OutputFolder(locate(annotations, storage)))
        check_publishing(found.folder, found.schema, tables, storage)
    if dry_run:
        typer.echo(f"to do    {found.rows} rows in {len(found.files)} files; nothing was written (--dry-run)", err=True)
        return
    with working("publishing failed; rerun the same command", bad_input=(OutputInUseError,), resumable=True):
        done = publish_set(found.folder, tables, storage)
    for one in done:
        typer.echo(one.describe(), err=True)
    if as_json:
        typer.echo(json.dumps({"output": found.folder.uri, "published": [dataclasses.asdict(one) for one in done]}))


if __name__ == "__main__":
    run(publish)
