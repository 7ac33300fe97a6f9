"""Choose the answers of an annotated set again with other weights, threshold or constraints, without a model.

``python -m jobs.rescore --annotations RUN --output URI --set decoding.weights.relevance=2``
"""

import dataclasses
import json
import logging
from typing import Annotated

import typer

from jobs.common import RunFile, checking, start_logging, working
from jobs.shell import run
from pipeline.config.run import load_sections, load_storage
from pipeline.evaluation.rescored_set import check_rescoring, rescore_set
from pipeline.nodes.access import NodeAccessError
from pipeline.report.write import leave_report
from pipeline.storage.lease import OutputInUseError


def rescore(
    annotations: Annotated[str, typer.Option(help="Folder of a finished annotated set with its candidates.")],
    output: Annotated[str, typer.Option(help="Folder for the new annotated set.")],
    config: RunFile = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting of decoding or storage, such as decoding.weights.support=2."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a machine-readable summary on stdout.")] = False,
) -> None:
    """Rescore an annotated set with other settings, without an engine.

    Exit status: 0 all rows answered, 3 some rows in errors/, 1 failed, 2 bad usage.
    """
    start_logging(logging.INFO, timestamps=True)
    of_storage = [setting for setting in settings or [] if setting.startswith("storage.")]
    of_decoding = [setting for setting in settings or [] if not setting.startswith("storage.")]
    with checking():
        changes = load_sections(None, of_decoding, ["decoding"])["decoding"]
        plan = check_rescoring(annotations, output, changes, load_storage(config, of_storage), overwrite)
    if dry_run:
        typer.echo(f"to do    {len(plan.units)} units of {annotations}; nothing was written (--dry-run)", err=True)
        return
    hint = "the rescoring failed; rerun the same command to continue"
    with working(hint, bad_input=(OutputInUseError, NodeAccessError), resumable=True, overwrite=overwrite):
        done = rescore_set(plan)
    leave_report(plan.output.location)
    typer.echo(f"{done.changed} of {done.rows} answers changed; annotated set: {output}", err=True)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(done)))
    raise typer.Exit(3 if done.errors else 0)


if __name__ == "__main__":
    run(rescore)
