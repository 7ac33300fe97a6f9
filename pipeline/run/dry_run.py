"""Checks of a dry run that go beyond those of every run, since they read rows."""

import logging
from collections.abc import Iterator

from pipeline.decoding.piece_check import PIECES_ADVICE, check_pieces
from pipeline.decoding.profiles import Tasks
from pipeline.decoding.types import Query
from pipeline.engine.models import load_critic
from pipeline.queries.schema import read_rows, to_query
from pipeline.queries.units import read_unit
from pipeline.run.plan import RunPlan

log = logging.getLogger(__name__)

# Rows whose prompts are checked: what a tokenizer does differently shows in any row.
CHECKED_ROWS = 8


def check_prompts(plan: RunPlan) -> None:
    """Warn, in one line, if the tokenizer encodes the prompts of the first rows otherwise than as one string.

    Raises:
        ValueError: the tokenizer does not support the critic, or the query set has changed since it was planned.
        StorageError: the storage cannot be read.
    """
    config = plan.config
    if difference := check_pieces(load_critic(config), read_first_queries(plan)):
        log.warning("model %s: %s; %s", config.model.name, difference, PIECES_ADVICE)


def read_first_queries(plan: RunPlan) -> Iterator[Query]:
    """Read the first queries with the instructions of their tasks; rows that a run would reject are left out."""
    config = plan.config
    tasks = Tasks(config.decoding, config.profiles, config.task)
    table = read_unit(plan.queries.units[0], plan.queries.schema, config.storage)
    for row in read_rows(table.slice(0, CHECKED_ROWS)):
        if isinstance(row, ValueError):
            continue
        try:
            query, _ = tasks.apply(to_query(row, config.columns))
        except ValueError:
            continue
        yield query
