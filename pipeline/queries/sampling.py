"""Draws a sample of the rows of a query set, spread over its files."""

import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from pipeline.config.sections import ExecutionConfig, SampleConfig
from pipeline.queries.division import FEWEST_UNIT_ROWS


def keep_sample(wanted: npt.NDArray[np.bool_], parts: Iterable[int], sample: SampleConfig) -> None:
    """Keep one row of each of ``sample.rows`` equal stretches of the wanted rows, drawn at random.

    So the files, and tasks whose rows lie together, have their share of the sample.

    Args:
        wanted: bool [rows of the query set]; changed in place. With no more wanted rows than the sample's, all stay.
        parts: numbers of rows of consecutive parts, which are looked at one at a time.
        sample: size of the sample and random seed.
    """
    total = int(wanted.sum())
    if sample.rows is None or sample.rows >= total:
        return
    edges = np.arange(sample.rows + 1, dtype=np.int64) * total // sample.rows
    drawn = np.random.default_rng(sample.seed).integers(edges[:-1], edges[1:])
    first = seen = 0
    for rows in parts:
        part = wanted[first : first + rows]
        places = np.flatnonzero(part)
        left, right = np.searchsorted(drawn, (seen, seen + len(places)))
        part[:] = False
        part[places[drawn[left:right] - seen]] = True
        first, seen = first + rows, seen + len(places)


def choose_sample_unit_rows(rows: int, execution: ExecutionConfig) -> int:
    """Choose the number of rows of a sample's units, so that as many of its rows as possible are in flight at once."""
    share = math.ceil(rows / (execution.actors * execution.units_in_flight))
    return execution.unit_rows or min(share, FEWEST_UNIT_ROWS)
