"""Builds the lexical part of an index: counts the words of all shards, then scores those of each.

Each shard is read twice, since a word's score depends on the number of passages that have it in the whole corpus.
"""

import logging
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.decoding.prompts import format_passage
from pipeline.indexing.actor_pool import map_over_actors
from pipeline.indexing.build import BuildFolder, BuildPlan
from pipeline.indexing.postings import WordCounts, WordStatistics, merge_statistics, score_postings
from pipeline.nodes.access import Packed
from pipeline.retrieval.index_cache import SCRATCH_PREFIX, hash_file
from pipeline.retrieval.manifest import LexicalEntry, ShardEntry
from pipeline.retrieval.shard_files import name_lexical_file, publish_shard
from pipeline.retrieval.words import WordForm, WordSplitter

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LexicalTask:
    """Shards and words: the part of the work that the plan does not have.

    Attributes:
        form: form of the words.
        entries: entries of the shards, by number.
        statistics: Ray reference to the statistics of the corpus; None while they are counted.
    """

    form: WordForm
    entries: dict[int, ShardEntry]
    statistics: Any = None


class _ShardReader:
    """Counts the words of shards.

    Args:
        packed: plan of the build.
        task: shards and form of the words.
        tally: Ray handle of a ``BuildProgress``.
    """

    def __init__(self, packed: Packed[BuildPlan], task: LexicalTask, tally: Any) -> None:
        self.plan, self.task, self.tally = packed.unpack(), task, tally
        self.splitter = WordSplitter(task.form)

    def count_words(self, number: int) -> WordCounts:
        """Count the words of the titles and texts of a shard's passages."""
        counted = WordCounts()
        for batch in self._read_batches(self.task.entries[number].passages_file):
            for title, text in zip(batch["title"].to_pylist(), batch["text"].to_pylist(), strict=True):
                counted.add(self.splitter.split(format_passage(title, text)))
            self.tally.add.remote(batch.num_rows)
        return counted

    def _read_batches(self, name: str) -> Iterator[pa.RecordBatch]:
        file = self.plan.output / name
        with file.filesystem.open_input_file(file.path) as source, pa.ipc.open_file(source) as reader:
            for number in range(reader.num_record_batches):
                yield reader.get_batch(number)


class WordCounter(_ShardReader):
    """A Ray actor that returns the statistics of shards."""

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Return the words of the shards with the given numbers, and the passages that have them.

        A row without a word stands for the shard itself: its number of passages, and of words.
        """
        parts = []
        for number in batch["item"].to_pylist():
            found = self.count_words(number).summarize()
            totals = {"passages": [found.passages], "words": [found.words]}
            whole = pa.table({"word": pa.nulls(1, pa.large_string()), **totals})
            parts.append(pa.concat_tables([whole, found.frequencies], promote_options="permissive"))
        return pa.concat_tables(parts)


class LexicalBuilder(_ShardReader):
    """A Ray actor that writes the lexical parts of shards."""

    def __init__(self, packed: Packed[BuildPlan], task: LexicalTask, tally: Any) -> None:
        import ray

        super().__init__(packed, task, tally)
        self.corpus: WordStatistics = ray.get(task.statistics)
        self.folder = BuildFolder(self.plan.output)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Write the lexical parts of the shards with the given numbers, and return their entries."""
        entries = [self.build(number) for number in batch["item"].to_pylist()]
        return pa.table({"item": batch["item"], "entry": [entry.model_dump_json() for entry in entries]})

    def build(self, number: int) -> ShardEntry:
        """Score the words of a shard, write its file, and record it."""
        counted = self.count_words(number)
        postings = score_postings(counted, self.corpus, self.task.form)
        output, name = self.plan.output, name_lexical_file(number)
        with tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX, dir=output.path if output.local else None) as scratch:
            file = Path(scratch) / name
            postings.write(file)
            size, words = file.stat().st_size, sum(counted.lengths)
            lexical = LexicalEntry(file=name, bytes=size, sha256=hash_file(file), words=words)
            publish_shard(file, output / name)
        entry = self.task.entries[number].model_copy(update={"lexical": lexical})
        self.folder.keep(number, entry)
        return entry


def build_lexical(
    plan: BuildPlan, form: WordForm, entries: dict[int, ShardEntry], base: WordStatistics | None = None
) -> dict[int, ShardEntry]:
    """Add lexical parts to the shards that have none, and return the entries of all shards by number.

    Args:
        plan: plan of the build.
        form: form of the words.
        entries: entries of the shards, by number.
        base: words of the index that the shards are added to, which their scores are computed with.

    Raises:
        ray.exceptions.RayError: a shard failed.
    """
    import ray

    missing = [number for number, entry in entries.items() if entry.lexical is None]
    if not missing:
        return entries
    log.info("counting the words of %d shards", len(entries))
    passages = sum(entry.rows for entry in entries.values())
    with map_over_actors(plan, WordCounter, LexicalTask(form, entries), sorted(entries), passages, False) as counted:
        corpus = _add_up(list(counted.iter_batches(batch_size=None, batch_format="pyarrow")))
    if base is not None:
        corpus = base.extend(corpus)
    log.info("scoring %s different words", f"{corpus.frequencies.num_rows:,}")
    task = LexicalTask(form, entries, ray.put(corpus))
    rows = sum(entries[number].rows for number in missing)
    with map_over_actors(plan, LexicalBuilder, task, missing, rows, False) as built:
        written = {row["item"]: ShardEntry.model_validate_json(row["entry"]) for row in built.iter_rows()}
    return entries | written


def _add_up(parts: Sequence[pa.Table]) -> WordStatistics:
    """Add up the tables that word counters return."""
    table = pa.concat_tables(parts)
    whole = table.filter(pc.is_null(table["word"]))
    passages, words = (pc.sum(whole[name]).as_py() for name in ("passages", "words"))
    found = table.filter(pc.is_valid(table["word"])).select(["word", "passages"])
    return merge_statistics([WordStatistics(passages, words, found)])
