"""Rescores annotated rows: runs the same beam search over their recorded candidates, without generating again.

The run never continued the paths that it pruned: a path that other weights keep ends there. With the run's own
settings the answers are those of the run.
"""

import asyncio
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from pipeline.config.loading import validate_section
from pipeline.config.sections import Columns, DecodingConfig, Weights
from pipeline.decoding.beam import search
from pipeline.decoding.critique import segment_score
from pipeline.decoding.profiles import limit_segments
from pipeline.decoding.reflection import IsSup, Retrieve
from pipeline.decoding.self_rag import conclude
from pipeline.decoding.types import (
    Answer,
    Boundary,
    Candidate,
    Critique,
    Finish,
    Passage,
    Path,
    RetrievedPassage,
    Segment,
    Usage,
)
from pipeline.output.folder import get_columns
from pipeline.output.schema import to_answer_row

CHANGEABLE = frozenset({"threshold", "weights", "constraint", "citations"})
CHANGEABLE_NAMES = ", ".join(f"decoding.{name}" for name in sorted(CHANGEABLE))


@dataclass(frozen=True)
class Recorded:
    """The decoding that an annotated row records.

    Attributes:
        root: empty path with the first decision.
        candidates: scored candidates of the run, parents before their children.
        usage: cost of decoding the row.
    """

    root: Path
    candidates: tuple[Candidate, ...]
    usage: Usage

    async def rechoose(self, config: DecodingConfig, choices: Sequence[str] = ()) -> Answer:
        """Choose the answer with other weights, threshold, constraint or citations."""
        candidates = tuple(rescore_candidate(candidate, config.weights) for candidate in self.candidates)
        children: defaultdict[Path, list[Path]] = defaultdict(list)
        paths: list[Path] = []
        for candidate in candidates:
            parent = self.root if candidate.parent is None else paths[candidate.parent]
            paths.append(Path((*parent.segments, candidate.segment), candidate.boundary, candidate.finish))
            children[parent].append(paths[-1])

        async def expand(path: Path) -> Sequence[Path]:
            return children[path]

        found = await search(self.root, expand, config, childless=Finish.PRUNED)
        return conclude(self.root, found, choices, config, self.usage, candidates)


@dataclass(frozen=True)
class Rescoring:
    """Settings with which the rows of a run are rescored.

    Attributes:
        columns: names in the annotated set of the columns of the query set.
        tasks: decoding settings and closed set by task; ``""`` stands for rows without one.
    """

    columns: Columns
    tasks: Mapping[str, tuple[DecodingConfig, tuple[str, ...]]]

    @classmethod
    def of(cls, manifest: Mapping[str, Any], changes: Mapping[str, Any]) -> "Rescoring":
        """Read the settings of a run and change some of them.

        Args:
            manifest: manifest of the run.
            changes: settings of the section ``decoding``, nested as in the configuration.

        Raises:
            ValueError: a setting cannot be changed after the run, or the run did not keep the data that this needs.
        """
        if "tasks" not in manifest:
            raise ValueError("the run's manifest does not describe its tasks: it was written by an earlier version")
        tasks = {name: _change_settings(task, changes) for name, task in manifest["tasks"].items()}
        return cls(get_columns(manifest), tasks)

    async def answer(self, row: Mapping[str, Any]) -> Answer:
        """Rescore one annotated row."""
        config, choices = self.get_settings(row)
        return await to_recorded(row).rechoose(config, choices)

    def get_settings(self, row: Mapping[str, Any]) -> tuple[DecodingConfig, tuple[str, ...]]:
        """Return the decoding settings and the closed set of a row."""
        config, choices = self.tasks[row.get(self.columns.task) or ""]
        choices = tuple(row.get(self.columns.choices) or ()) or choices
        return limit_segments(config, choices), choices


def _change_settings(task: Mapping[str, Any], changes: Mapping[str, Any]) -> tuple[DecodingConfig, tuple[str, ...]]:
    before = task["decoding"]
    if not isinstance(changes.get("weights", {}), dict):
        raise ValueError("decoding.weights: expected nested settings, such as decoding.weights.support=2")
    if fixed := sorted(changes.keys() - CHANGEABLE):
        raise ValueError(f"decoding.{fixed[0]} cannot be changed without generating again; only {CHANGEABLE_NAMES} can")
    if not before["keep_candidates"]:
        raise ValueError("the run recorded no candidates; annotate with decoding.keep_candidates=true")
    if changes.get("threshold", before["threshold"]) != before["threshold"] and not supports_any_threshold(before):
        raise ValueError(
            "decoding.threshold cannot be changed: this requires a run with decoding.explore=true and "
            "answers of one segment"
        )
    weights = {**before["weights"], **changes.get("weights", {})}
    decoding = validate_section(DecodingConfig, {**before, **changes, "weights": weights}, "decoding")
    return decoding, tuple(task["choices"])


def supports_any_threshold(decoding: Mapping[str, Any]) -> bool:
    """Whether a run can be rescored with any threshold.

    Only the first decision is explored, so answers must have one segment.
    """
    return bool(decoding["explore"]) and decoding["segments"] == 1


def rescore_candidate(candidate: Candidate, weights: Weights) -> Candidate:
    """Return the candidate with its score under other weights."""
    judged = candidate.segment.critique
    score = segment_score(judged.sequence_probability, judged.is_rel, judged.is_sup, judged.is_use, weights)
    return replace(candidate, segment=replace(candidate.segment, critique=replace(judged, score=score)))


def to_recorded(row: Mapping[str, Any]) -> Recorded:
    """Convert an annotated row, as read from Arrow.

    Raises:
        ValueError: the run did not keep its candidates.
    """
    if row.get("candidates") is None or row.get("evidence") is None:
        raise ValueError("the rows contain no candidates; annotate with decoding.keep_candidates=true")
    passages = {p["id"]: Passage(p["id"], p["title"], p["text"], p.get("metadata")) for p in row["evidence"]}
    root = Path((), Boundary(row["retrieve_probability"]))
    return Recorded(root, tuple(_to_candidate(c, passages) for c in row["candidates"]), Usage(**row["usage"]))


def _to_candidate(row: Mapping[str, Any], passages: Mapping[str, Passage]) -> Candidate:
    critique = Critique(
        sequence_probability=row["sequence_probability"],
        is_rel=row["is_rel"],
        is_sup=row["is_sup"],
        is_use=row["is_use"],
        score=row["score"],
        support=IsSup(row["support"]) if row["support"] else None,
    )
    evidence = None
    if row["passage_id"] is not None:
        beside = [_to_read(other, passages) for other in row.get("beside") or ()]
        evidence = replace(_to_read(row, passages), beside=tuple(beside))
    finish = Finish(row["finish_reason"]) if row["finish_reason"] else None
    boundary = None if finish else Boundary(row["next_retrieve_probability"], row["next_keeps_evidence"])
    segment = Segment(row["text"], row["raw"], evidence, critique, Retrieve(row["opening"]))
    return Candidate(segment, row["parent"], boundary, finish)


def _to_read(row: Mapping[str, Any], passages: Mapping[str, Passage]) -> RetrievedPassage:
    """Convert a passage that a candidate read; sets of earlier versions have no ``rerank_score``."""
    passage = passages[row["passage_id"]]
    return RetrievedPassage(passage, row["retrieval_score"], row["rank"], row.get("rerank_score"))


# Columns that rescoring replaces; ``usage`` stays that of the run.
REWRITTEN = ("answer", "raw_output", "retrieved", "finish_reason", "segments", "passages", "candidates")


def rescore_table(table: pa.Table, rescoring: Rescoring) -> pa.Table:
    """Rescore the rows of a table; columns and order stay the same."""
    columns = rescoring.columns
    needed = [columns.task, columns.choices, "candidates", "evidence", "retrieve_probability", "usage"]
    read = table.select([name for name in needed if name in table.column_names])  # Python cannot hold every value

    async def choose() -> list[dict[str, Any]]:
        return [to_answer_row(await rescoring.answer(row)) for row in read.to_pylist()]

    rows = asyncio.run(choose())
    for name in REWRITTEN:
        column = table.schema.get_field_index(name)
        field = table.schema.field(column)
        table = table.set_column(column, field, pa.array([row[name] for row in rows], field.type))
    return table
