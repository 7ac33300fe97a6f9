"""Write a report on an annotated set: one HTML page, made from the files of the set alone.

``python -m jobs.report --annotations URI [--output FILE] [--baseline URI] [--price-per-hour 4.50]``

The page opens offline in any browser: it has no scripts and loads nothing. ``jobs.annotate`` writes one at its end.
"""

import logging
from typing import Annotated

import typer

from jobs.common import RunFile, StorageSettings, checking, start_logging
from jobs.shell import run
from pipeline.config.run import load_storage
from pipeline.report.write import write_report
from pipeline.storage.location import locate

log = logging.getLogger(__name__)


def report(
    annotations: Annotated[str, typer.Option(help="Folder of an annotated set: the --output of jobs.annotate.")],
    output: Annotated[
        str | None, typer.Option(help="File for the page; report.html in that folder by default.")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Folder of an earlier annotated set of the same queries, to compare with.")
    ] = None,
    price_per_hour: Annotated[
        float | None,
        typer.Option(min=0.0, help="Hourly price of one actor's machine, in any currency; adds query costs."),
    ] = None,
    config: RunFile = None,
    settings: StorageSettings = None,
) -> None:
    """Write an HTML report on an annotated set: what ran, how fast, at what cost, and how good its answers look."""
    start_logging(logging.INFO)
    with checking():
        storage = load_storage(config, settings or [])
        file = locate(output, storage) if output else None
        earlier = locate(baseline, storage) if baseline else None
        written = write_report(locate(annotations, storage), file, earlier, price_per_hour)
    log.info("written: %s", written.uri)


if __name__ == "__main__":
    run(report)
