"""Report on an annotated set: one HTML page, from its files alone.

``python -m jobs.report --annotations URI [--output FILE] [--baseline URI] [--price-per-hour 4.50]``

The page opens offline in any browser: it has no scripts and asks for nothing. ``jobs.annotate`` writes one at the end.
"""

import logging
from typing import Annotated, Any

import typer

from jobs.options import RunFile, StorageSettings
from pipeline.config.run import load_storage
from pipeline.output.folder import REPORT, OutputFolder, columns_of
from pipeline.report.changes import changes, sample_of
from pipeline.report.examples import examples
from pipeline.report.figures import Reading, read_set
from pipeline.report.page import AnnotatedSet, Compared, headlines, page
from pipeline.storage.location import Location, locate, one_line

log = logging.getLogger(__name__)


def write_report(
    folder: Location, file: Location | None = None, baseline: Location | None = None, price: float | None = None
) -> Location:
    """Write the report of an annotated set; where it was written.

    Args:
        file: ``report.html`` in the folder by default.
        baseline: an earlier set to compare with.
        price: of one actor's machine for an hour.

    Raises:
        ValueError: no annotated set there, or a column is missing.
        OSError: it cannot be read or written.
    """
    sample = sample_of(_manifest(folder), _manifest(baseline)) if baseline else 0
    annotated, compared = _read(folder, sample), None
    if baseline:
        earlier = _read(baseline, sample)
        changed = changes(annotated.figures.answers, earlier.figures.answers, sample)
        compared = Compared(earlier, headlines(earlier, price), changed)
    figures = annotated.figures
    rows = {task: group.rows for task, group in figures.groups.items()}
    found = examples(figures.picks, rows, columns_of(annotated.manifest))
    written = file or folder / REPORT
    written.write(page(annotated, found, price, compared).encode())
    return written


def _read(folder: Location, sample: int) -> AnnotatedSet:
    manifest, output = _manifest(folder), OutputFolder(folder)
    return AnnotatedSet(output, manifest, output.finished(), read_set(output, Reading.of(manifest, sample)))


def _manifest(folder: Location) -> dict[str, Any]:
    manifest = OutputFolder(folder).manifest()
    if manifest is None:
        raise ValueError(
            f"{folder.uri}: no annotated set there (it has no _manifest.json); name the --output of jobs.annotate"
        )
    return manifest


def leave_report(folder: Location) -> None:
    """Write the report at the end of a run, which is good without it: whatever goes wrong is a warning."""
    try:
        write_report(folder)
    except Exception as error:  # noqa: BLE001  the run is finished, and its page can be written later
        log.warning("no report was written (%s); python -m jobs.report --annotations %s", one_line(error), folder.uri)


def report(
    annotations: Annotated[str, typer.Option(help="Folder of an annotated set: the --output of jobs.annotate.")],
    output: Annotated[
        str | None, typer.Option(help="File for the page; report.html in that folder by default.")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Folder of an earlier annotated set of the same queries, to compare with.")
    ] = None,
    price_per_hour: Annotated[
        float | None, typer.Option(min=0.0, help="Of one actor's machine, in any currency: shows what queries cost.")
    ] = None,
    config: RunFile = None,
    settings: StorageSettings = None,
) -> None:
    """Write a page about an annotated set: what ran, how fast, at what cost, and how good its answers look."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        storage = load_storage(config, settings or [])
        file, earlier = (locate(uri, storage) if uri else None for uri in (output, baseline))
        written = write_report(locate(annotations, storage), file, earlier, price_per_hour)
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    log.info("written: %s", written.uri)


if __name__ == "__main__":
    typer.run(report)
