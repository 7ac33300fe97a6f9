"""Select the queries of a run: those that no earlier run has finished, for recurring runs, or a sample.

The selection is made once and stored in the output folder before any row is annotated, so that the same command resumes
with the same rows, whatever has been added to the query set or annotated in the meantime.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Annotated

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from pipeline.config.loading import Frozen
from pipeline.config.sections import NO_SAMPLE, SampleConfig, StorageConfig
from pipeline.output.unit_files import is_unit_file
from pipeline.queries.ids import number_ids
from pipeline.queries.query_set import QuerySet
from pipeline.queries.sampling import keep_sample
from pipeline.queries.units import read_unit
from pipeline.queries.writer import FILE_ROWS, GROUP_ROWS
from pipeline.storage.hashes import Hashes, HashRuns, hash_twice
from pipeline.storage.location import Location
from pipeline.storage.parquet import encode_parquet, map_in_threads, read_columns
from pipeline.storage.records import read_record

# The error type of invalid rows, which would fail again.
OWN_FAULT = "ValueError"
# Number of sets in which a row must have failed, for any reason, to be left out.
TRIES = 2


class NothingNewError(Exception):
    """Earlier annotated sets have finished all queries."""


@dataclass(frozen=True)
class Earlier:
    """The annotated sets of earlier runs.

    Attributes:
        folder: folder that holds the sets, at any depth.
        apart_from: annotated set of this run, which is not read.
        id_column: column of ids in the query sets.
    """

    folder: Location
    apart_from: Location
    id_column: str

    def find_new(self, queries: QuerySet, storage: StorageConfig) -> npt.NDArray[np.bool_]:
        """Find the queries that no set has finished: not answered, nor invalid, nor failed in two sets.

        Ids are compared by hashes of 128 bits. Memory: one byte for each query, and some hundred megabytes; the hashes
        are on disk, 24 bytes for each row.

        Returns:
            bool [rows of the query set], in its order.

        Raises:
            ValueError: a set has no column of ids, or a query file has changed since it was inspected.
            StorageError: a file cannot be read; names it.
        """
        new = np.ones(queries.rows, bool)
        with HashRuns() as tries, HashRuns() as asked:
            map_in_threads(lambda file: tries.add(self._weigh_rows(file)), self._list_files())
            starts = accumulate((file.rows for file in queries.inspected), initial=0)
            numbered = zip(queries.inspected, starts, strict=False)
            map_in_threads(lambda pair: number_ids(*pair, self.id_column, storage, asked.add), numbered)
            count = max(tries.count_ranges(), asked.count_ranges())
            for ours, theirs in zip(asked.read_ranges(count), tries.read_ranges(count), strict=False):
                new[_find_finished(ours, theirs)] = False
        return new

    def _list_files(self) -> list[Location]:
        own = f"{self.apart_from.path.rstrip('/')}/"
        files = [file for file in self.folder.list_files(".parquet") if not file.path.startswith(own)]
        return [file for file in files if is_unit_file(file, "data") or is_unit_file(file, "errors")]

    def _weigh_rows(self, file: Location) -> Hashes:
        """Return uint64 [3, rows]: the hashes of the ids, and the tries for which each row counts."""
        failed = is_unit_file(file, "errors")
        table = read_columns(file, [self.id_column, *(["error_type"] if failed else [])])
        if self.id_column not in table.column_names:
            raise ValueError(f"{file.uri}: no id column {self.id_column!r} (columns.id)")
        hashes = hash_twice(table[self.id_column])
        tries = np.full(hashes.shape[1], TRIES, np.uint64)
        if failed:
            own_fault = pc.equal(table["error_type"].cast(pa.string()), OWN_FAULT).fill_null(False)
            tries[~own_fault.to_numpy()] = 1
        return np.vstack([hashes, tries])


def _find_finished(asked: Hashes, tries: Hashes) -> Hashes:
    """Return the numbers of the rows whose id has ``TRIES`` tries or more; both in a range, sorted by their hashes."""
    tries = tries[:, np.lexsort((tries[1], tries[0]))]
    if not tries.shape[1]:
        return np.empty(0, np.uint64)
    changes = (tries[:2, 1:] != tries[:2, :-1]).any(axis=0)
    firsts = np.concatenate([[0], np.flatnonzero(changes) + 1])
    finished = tries[:2, firsts[np.add.reduceat(tries[2], firsts) >= TRIES]]
    if not finished.shape[1]:
        return np.empty(0, np.uint64)
    # If two finished ids share the first hash, only one of them is found; the other is annotated once more.
    places = np.minimum(np.searchsorted(finished[0], asked[0]), finished.shape[1] - 1)
    rows: Hashes = asked[2, (finished[:, places] == asked[:2]).all(axis=0)]
    return rows


class SelectionRecord(Frozen):
    """The content of ``_selection.json``: what :class:`Selection` keeps, and the URI of the query set."""

    queries: str
    known: Annotated[int, Field(ge=0)]
    sample: SampleConfig = NO_SAMPLE
    population: Annotated[int, Field(ge=1)] | None = None
    unit_rows: Annotated[int, Field(ge=1)] | None = None


@dataclass(frozen=True)
class Selection:
    """The selected queries of a run.

    Attributes:
        folder: query set of these queries.
        known: number of queries that were left out, since earlier sets have finished them.
        sample: sample that was drawn from the others; without ``rows``, all of them were selected.
        population: number of queries that the sample was drawn from; None if there is no sample.
        unit_rows: number of rows of a unit of the sample; None if there is no sample.
    """

    folder: Location
    known: int
    sample: SampleConfig = NO_SAMPLE
    population: int | None = None
    unit_rows: int | None = None

    @classmethod
    def load(cls, output: Location, queries: str, sample: SampleConfig) -> "Selection | None":
        """Return the selection that is stored in an output, or None.

        Args:
            output: output folder of the run.
            queries: URI of the query set.
            sample: sample that the run wants.

        Raises:
            ValueError: the stored selection was made from another query set, or is another sample.
        """
        folder = output / "_queries"
        if not _locate_record(folder).exists():
            return None
        record = read_record(SelectionRecord, _locate_record(folder))
        if record.queries != queries:
            raise ValueError(
                f"{folder.uri} was selected from {record.queries}; choose another output, "
                "or replace it with --overwrite"
            )
        if record.sample != sample and (record.sample.rows or sample.rows):
            raise ValueError(
                f"{folder.uri} holds {describe_sample(record.sample)}, not {describe_sample(sample)}; choose another "
                "output, or replace it with --overwrite"
            )
        return cls(folder, record.known, record.sample, record.population, record.unit_rows)

    @classmethod
    def choose(
        cls,
        queries: QuerySet,
        earlier: Earlier | None,
        storage: StorageConfig,
        scratch: Location,
        sample: SampleConfig = NO_SAMPLE,
    ) -> "Selection":
        """Select the new queries, or a sample of them, and write them to a folder.

        Driver memory: as of :meth:`Earlier.find_new`, and the rows of a file.

        Args:
            queries: query set to select from.
            earlier: earlier annotated sets; None if all queries are new.
            storage: access to object storage.
            scratch: empty folder for the selected queries.
            sample: sample to draw.

        Raises:
            NothingNewError: there are no new queries.
            ValueError: an earlier set has no column of ids.
            StorageError: the storage cannot be read.
        """
        new = earlier.find_new(queries, storage) if earlier else np.ones(queries.rows, bool)
        count = int(new.sum())
        if earlier and not count:
            raise NothingNewError(
                f"all {queries.rows} queries are already answered or failed below {earlier.folder.uri}; "
                "nothing is left to do"
            )
        keep_sample(new, (unit.rows for unit in queries.units), sample)
        for number, table in enumerate(_merge_tables(_read_selected(queries, new, storage))):
            (scratch / f"part-{number:05d}.parquet").write(encode_parquet(table, GROUP_ROWS))
        return cls(scratch, queries.rows - count, sample, count if sample.rows else None)

    def keep(self, output: Location, queries: str) -> "Selection":
        """Store the selection in the output folder, replacing another one; the record is written last."""
        folder = output / "_queries"
        for file in [_locate_record(folder), *folder.list_files(".parquet")]:
            if file.exists():
                file.delete()
        for file in self.folder.list_files(".parquet"):
            (folder / file.name).write(file.read())
        kept = {"known": self.known, "sample": self.sample, "population": self.population, "unit_rows": self.unit_rows}
        record = SelectionRecord.model_validate({"queries": queries, **kept})
        _locate_record(folder).write(record.model_dump_json().encode())
        return replace(self, folder=folder)


def describe_sample(sample: SampleConfig) -> str:
    """Describe a sample in words."""
    return f"a sample of {sample.rows} rows (seed {sample.seed})" if sample.rows else "all new rows"


def _locate_record(folder: Location) -> Location:
    return folder / "_selection.json"


def _read_selected(queries: QuerySet, new: npt.NDArray[np.bool_], storage: StorageConfig) -> Iterator[pa.Table]:
    first = 0
    for unit in queries.units:
        mask = new[first : first + unit.rows]
        first += unit.rows
        if mask.any():
            yield read_unit(unit, queries.schema, storage).filter(pa.array(mask))


def _merge_tables(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Concatenate small tables into tables of at least ``FILE_ROWS`` rows; the last one may be smaller."""
    waiting: list[pa.Table] = []
    rows = 0
    for table in tables:
        waiting.append(table)
        rows += table.num_rows
        if rows >= FILE_ROWS:
            yield pa.concat_tables(waiting)
            waiting, rows = [], 0
    if waiting:
        yield pa.concat_tables(waiting)
