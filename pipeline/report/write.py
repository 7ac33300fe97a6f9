"""Writes the report of an annotated set, by default into the folder of the set."""

import logging
from collections.abc import Mapping
from typing import Any

from pipeline.output.folder import REPORT, OutputFolder, get_columns
from pipeline.report.changes import (
    Changes,
    choose_sampling_interval,
    compare_answers,
    read_answers,
    read_changed_answers,
)
from pipeline.report.examples import read_examples
from pipeline.report.figures import ReadOptions, read_set
from pipeline.report.page import Compared, ReportedSet, compute_headlines, render_page
from pipeline.storage.location import Location, join_lines

log = logging.getLogger(__name__)


def write_report(
    folder: Location, file: Location | None = None, baseline: Location | None = None, price: float | None = None
) -> Location:
    """Write the report of an annotated set and return its location.

    Args:
        folder: folder of the annotated set.
        file: file to write; ``report.html`` in the folder by default.
        baseline: folder of an earlier set to compare with.
        price: price of one actor's machine per hour, in any currency.

    Raises:
        ValueError: a folder holds no annotated set, or a column is missing.
        OSError: a file cannot be read or written.
    """
    manifest, before = _read_manifest(folder), _read_manifest(baseline) if baseline else {}
    annotated, compared = _read(folder, manifest), None
    if baseline:
        earlier = _read(baseline, before)
        examples = read_changed_answers(annotated.output, earlier.output, get_columns(manifest))
        compared = Compared(earlier, compute_headlines(earlier, price), _count_changes(annotated, earlier), examples)
    figures = annotated.figures
    rows = {task: group.rows for task, group in figures.groups.items()}
    found = read_examples(figures.picks, rows, get_columns(annotated.manifest))
    written = file or folder / REPORT
    written.write(render_page(annotated, found, price, compared).encode())
    return written


def _read(folder: Location, manifest: Mapping[str, Any]) -> ReportedSet:
    output = OutputFolder(folder)
    return ReportedSet(output, manifest, output.is_finished(), read_set(output, ReadOptions.of(manifest)))


def _count_changes(*compared: ReportedSet) -> Changes:
    sample = choose_sampling_interval(*(annotated.manifest for annotated in compared))
    ours, theirs = (read_answers(each.output, get_columns(each.manifest).id, sample) for each in compared)
    return compare_answers(ours, theirs, sample)


def _read_manifest(folder: Location) -> dict[str, Any]:
    manifest = OutputFolder(folder).read_manifest()
    if manifest is None:
        raise ValueError(f"{folder.uri}: not an annotated set (no _manifest.json); pass the --output of jobs.annotate")
    return manifest


def leave_report(folder: Location, baseline: Location | None = None) -> None:
    """Write the report at the end of a run; errors become a warning, since the run is complete without it."""
    try:
        write_report(folder, baseline=baseline)
    except Exception as error:  # noqa: BLE001  the run is finished; the report can be written later
        log.warning(
            "no report was written (%s); run python -m jobs.report --annotations %s", join_lines(error), folder.uri
        )
