"""Verify an annotated set: read all of it, and compare it with its manifest and its query set.

``python -m jobs.verify --annotations URI [--json]``

Pages are compared with their checksums; earlier versions wrote none, and their pages are only decoded.
"""

import dataclasses
import json
import logging
from typing import Annotated

import typer

from jobs.common import RunFile, StorageSettings, checking, start_logging, working
from jobs.shell import run
from pipeline.config.run import load_storage
from pipeline.config.sections import StorageConfig
from pipeline.output.folder import OutputFolder
from pipeline.output.verification import PlannedIds, Verified, verify_set
from pipeline.queries.planned_ids import read_planned_ids
from pipeline.storage.location import StorageError, locate

log = logging.getLogger(__name__)


def verify(
    annotations: Annotated[str, typer.Option(help="Folder of an annotated set: the --output of jobs.annotate.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    config: RunFile = None,
    settings: StorageSettings = None,
) -> None:
    """Read every page of an annotated set, and check that each query is in it exactly once.

    Exit status: 0 whole, 1 not whole or not readable, 2 bad usage.
    """
    start_logging(progress=["pipeline.output.verification", "pipeline.queries.query_set"], timestamps=True)
    with checking():
        storage = load_storage(config, settings or [])
        folder = OutputFolder(locate(annotations, storage))
        if folder.read_manifest() is None:
            raise ValueError(f"{annotations}: not an annotated set (no _manifest.json); pass the --output of a run")
    with working():
        verified = verify_set(folder, read_ids(folder, storage))
    if as_json:
        typer.echo(json.dumps({**dataclasses.asdict(verified), "delete": verified.list_deletions()}))
    else:
        for line in summarize(verified):
            typer.echo(line)
    if verified.problems:
        raise typer.Exit(1)


def read_ids(folder: OutputFolder, storage: StorageConfig) -> PlannedIds | None:
    """Read the ids of the query set; log why they cannot be compared, and return None, if they cannot."""
    try:
        return read_planned_ids(folder, storage)
    except (ValueError, KeyError, StorageError) as error:
        log.warning("%s; the rows are not compared with the query set", error)
        return None


def summarize(verified: Verified) -> list[str]:
    """Summarize the outcome: a line for each fault, then the way to repair the set."""
    if not verified.problems:
        compared = "each query once" if verified.compared else "not compared with the query set"
        return [
            f"{verified.output}: whole, {verified.rows} rows in {verified.units} {_name_units(verified)}, "
            f"{verified.errors} in errors/, {compared}"
        ]
    lines = [problem.text for problem in verified.problems]
    deleted = verified.list_deletions()
    return [*lines, _name_remedy(verified), *(f"  {file}" for file in deleted)]


def _name_units(verified: Verified) -> str:
    return "files" if verified.compacted else "units"


def _name_remedy(verified: Verified) -> str:
    deleted = verified.list_deletions()
    if verified.compacted:
        others = ", and delete these files" if deleted else ""
        return f"to repair this compacted set, repeat the compaction or restore its files from a copy{others}"
    remedy = "delete these files, then run" if deleted else "run"
    return f"to repair the set, {remedy} the command that wrote it again"


if __name__ == "__main__":
    run(verify)
