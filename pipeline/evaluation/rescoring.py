"""Choose again without generating again: the same search, over the candidates that a row already has.

What was pruned in the run was never continued: where other weights would have kept it, it ends there. With the run's
own settings the outcome is the run's own.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.config.loading import validated
from pipeline.config.run import Columns, DecodingConfig, Weights
from pipeline.decoding.beam import search
from pipeline.decoding.critique import segment_score
from pipeline.decoding.profiles import for_choices
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

CHANGEABLE = frozenset({"threshold", "weights", "constraint", "citations"})
CHANGEABLE_NAMES = ", ".join(f"decoding.{name}" for name in sorted(CHANGEABLE))


@dataclass(frozen=True)
class Recorded:
    """What an annotated row holds of its decoding.

    Attributes:
        root: the empty path with the first decision.
        candidates: as written by the run.
        usage: what they cost.
    """

    root: Path
    candidates: tuple[Candidate, ...]
    usage: Usage

    async def rechoose(self, config: DecodingConfig, choices: Sequence[str] = ()) -> Answer:
        """The answer under other weights, threshold, constraint or citations."""
        candidates = tuple(rescored(candidate, config.weights) for candidate in self.candidates)
        families: defaultdict[Path, list[Path]] = defaultdict(list)
        paths: list[Path] = []
        for candidate in candidates:
            parent = self.root if candidate.parent is None else paths[candidate.parent]
            paths.append(Path((*parent.segments, candidate.segment), candidate.boundary, candidate.finish))
            families[parent].append(paths[-1])

        async def expand(path: Path) -> Sequence[Path]:
            return families[path]

        found = await search(self.root, expand, config, barren=Finish.PRUNED)
        return conclude(self.root, found, choices, config, self.usage, candidates)


@dataclass(frozen=True)
class Rescoring:
    """How the rows of a run are chosen again.

    Attributes:
        columns: of the query set.
        tasks: settings and closed set by task; ``""`` is for rows without one.
    """

    columns: Columns
    tasks: Mapping[str, tuple[DecodingConfig, tuple[str, ...]]]

    @classmethod
    def of(cls, manifest: Mapping[str, Any], changes: Mapping[str, Any]) -> "Rescoring":
        """The settings of a run with some of them changed.

        Args:
            manifest: of the run.
            changes: settings of the section ``decoding``, nested as in the configuration.

        Raises:
            ValueError: a setting cannot be changed afterwards, or the run did not keep what that takes.
        """
        if "tasks" not in manifest:
            raise ValueError("the run's manifest does not describe its tasks: it is of an earlier version")
        columns = Columns.model_validate(manifest["configuration"]["columns"])
        return cls(columns, {name: _changed(task, changes) for name, task in manifest["tasks"].items()})

    async def answer(self, row: Mapping[str, Any]) -> Answer:
        """Choose one annotated row's answer again."""
        config, choices = self.settings(row)
        return await recorded(row).rechoose(config, choices)

    def settings(self, row: Mapping[str, Any]) -> tuple[DecodingConfig, tuple[str, ...]]:
        """Settings and closed set of a row."""
        config, choices = self.tasks[row.get(self.columns.task) or ""]
        choices = tuple(row.get(self.columns.choices) or ()) or choices
        return for_choices(config, choices), choices


def _changed(task: Mapping[str, Any], changes: Mapping[str, Any]) -> tuple[DecodingConfig, tuple[str, ...]]:
    before = task["decoding"]
    if not isinstance(changes.get("weights", {}), dict):
        raise ValueError("decoding.weights: expected settings of its own, such as decoding.weights.support=2")
    if fixed := sorted(changes.keys() - CHANGEABLE):
        raise ValueError(f"decoding.{fixed[0]} cannot be changed without generating again, only {CHANGEABLE_NAMES}")
    if not before["keep_candidates"]:
        raise ValueError("the run holds no candidates; annotate with decoding.keep_candidates=true")
    if changes.get("threshold", before["threshold"]) != before["threshold"] and not any_threshold(before):
        raise ValueError(
            "decoding.threshold cannot be changed: that needs a run with decoding.explore=true and "
            "answers of one segment"
        )
    weights = {**before["weights"], **changes.get("weights", {})}
    return validated(DecodingConfig, {**before, **changes, "weights": weights}, "decoding"), tuple(task["choices"])


def any_threshold(decoding: Mapping[str, Any]) -> bool:
    """Whether a run's candidates tell what any threshold would have answered: only its first decision is explored."""
    return bool(decoding["explore"]) and decoding["segments"] == 1


def rescored(candidate: Candidate, weights: Weights) -> Candidate:
    """The candidate with the score that other weights give it."""
    judged = candidate.segment.critique
    score = segment_score(judged.sequence_probability, judged.is_rel, judged.is_sup, judged.is_use, weights)
    return replace(candidate, segment=replace(candidate.segment, critique=replace(judged, score=score)))


def recorded(row: Mapping[str, Any]) -> Recorded:
    """Read an annotated row, as Arrow gives it.

    Raises:
        ValueError: the run did not keep its candidates.
    """
    if row.get("candidates") is None or row.get("evidence") is None:
        raise ValueError("the rows hold no candidates; annotate with decoding.keep_candidates=true")
    passages = {p["id"]: Passage(p["id"], p["title"], p["text"]) for p in row["evidence"]}
    root = Path((), Boundary(row["retrieve_probability"]))
    return Recorded(root, tuple(_candidate(c, passages) for c in row["candidates"]), Usage(**row["usage"]))


def _candidate(row: Mapping[str, Any], passages: Mapping[str, Passage]) -> Candidate:
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
        evidence = RetrievedPassage(passages[row["passage_id"]], row["retrieval_score"], row["rank"])
    finish = Finish(row["finish_reason"]) if row["finish_reason"] else None
    boundary = None if finish else Boundary(row["next_retrieve_probability"], row["next_keeps_evidence"])
    segment = Segment(row["text"], row["raw"], evidence, critique, Retrieve(row["opening"]))
    return Candidate(segment, row["parent"], boundary, finish)
