"""Define the Arrow schemas of an annotated set, and convert answers to its rows."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from pipeline.decoding.choose import list_cited_passages, number_citations
from pipeline.decoding.types import Answer, Candidate, RetrievedPassage, Segment

CRITIQUE_FIELDS = [
    pa.field("is_rel", pa.float64()),
    pa.field("is_sup", pa.float64()),
    pa.field("is_use", pa.float64()),
    pa.field("sequence_probability", pa.float64()),
    pa.field("score", pa.float64()),
]
SEGMENT = pa.struct(
    [
        pa.field("text", pa.string()),
        pa.field("passage_id", pa.string()),
        pa.field("citation", pa.int32()),
        pa.field("further_citations", pa.list_(pa.int32())),
        *CRITIQUE_FIELDS,
    ]
)
# A passage that a candidate read beside its first one.
BESIDE = pa.struct(
    [
        pa.field("passage_id", pa.string()),
        pa.field("retrieval_score", pa.float64()),
        pa.field("rerank_score", pa.float64()),
        pa.field("rank", pa.int32()),
    ]
)
# Everything that rescoring needs. Candidates are a tree: ``parent`` is an index into the same list.
CANDIDATE = pa.struct(
    [
        pa.field("parent", pa.int32()),
        pa.field("opening", pa.string()),
        pa.field("text", pa.string()),
        pa.field("raw", pa.string()),
        *BESIDE,
        pa.field("beside", pa.list_(BESIDE)),
        *CRITIQUE_FIELDS,
        pa.field("support", pa.string()),
        pa.field("finish_reason", pa.string()),
        pa.field("next_retrieve_probability", pa.float64()),
        pa.field("next_keeps_evidence", pa.bool_()),
    ]
)
PASSAGE = pa.struct(
    [
        pa.field("id", pa.string()),
        pa.field("title", pa.string()),
        pa.field("text", pa.string()),
        pa.field("metadata", pa.string()),
        pa.field("retrieval_score", pa.float64()),
        pa.field("rerank_score", pa.float64()),
        pa.field("rank", pa.int32()),
    ]
)
USAGE = pa.struct(
    [
        pa.field("prompt_tokens", pa.int64()),
        pa.field("cached_tokens", pa.int64()),
        pa.field("generated_tokens", pa.int64()),
        pa.field("retrievals", pa.int32()),
        pa.field("empty_searches", pa.int32()),
        pa.field("engine_requests", pa.int32()),
        pa.field("truncated_tokens", pa.int32()),
        pa.field("seconds", pa.float64()),
        pa.field("decide_seconds", pa.float64()),
        pa.field("retrieve_seconds", pa.float64()),
        pa.field("rerank_seconds", pa.float64()),
        pa.field("critique_seconds", pa.float64()),
        pa.field("queue_seconds", pa.float64()),
        pa.field("prefill_seconds", pa.float64()),
        pa.field("decode_seconds", pa.float64()),
    ]
)
SEARCH = pa.struct([pa.field("text", pa.string()), pa.field("digest", pa.string())])
ANSWER_FIELDS = [
    pa.field("answer", pa.string()),
    pa.field("raw_output", pa.string()),
    pa.field("retrieved", pa.bool_()),
    pa.field("retrieve_probability", pa.float64()),
    pa.field("finish_reason", pa.string()),
    pa.field("segments", pa.list_(SEGMENT)),
    pa.field("passages", pa.list_(PASSAGE)),
    pa.field("searches", pa.list_(SEARCH)),
    pa.field("usage", USAGE),
    pa.field("carried_from", pa.string()),
]
# With ``decoding.keep_candidates``: every scored candidate, and every passage that was read, once.
CANDIDATE_FIELDS = [pa.field("candidates", pa.list_(CANDIDATE)), pa.field("evidence", pa.list_(PASSAGE))]
ERROR_FIELDS = [
    pa.field("error_type", pa.string()),
    pa.field("error_message", pa.string()),
    pa.field("attempts", pa.int32()),
]
# Shown in the dataset card; a test compares infra/DATA.md with them.
MEANINGS: Mapping[tuple[str, ...], str] = {
    ("answer", "raw_output"): "the answer without and with reflection tokens",
    ("retrieved", "retrieve_probability"): (
        "whether a passage was used; p(Retrieval) / (p(Retrieval) + p(No Retrieval)), null if the mode decided"
    ),
    ("finish_reason",): "why the answer ended: `stop`, `segments`, `length`, `room` or `constraint`",
    ("segments",): (
        "`text`, `passage_id`, `citation` (place in `passages`), `further_citations` (places of the "
        "other passages, with `decoding.reading: together`), `is_rel` = p(Relevant), `is_sup` = p(Fully) + 0.5 "
        "p(Partially), `is_use` in −1 … 1 (null if the model wrote no token of that group), `sequence_probability`, "
        "`score`"
    ),
    ("passages",): (
        "passages that the answer used: `id`, `title`, `text`, `metadata` (further columns as a JSON object, null if "
        "the index keeps none), `retrieval_score`, `rerank_score` (null without a reranker), `rank`"
    ),
    ("searches",): "`text` of each search of the index, and `digest` of the passages that it found",
    ("candidates", "evidence"): (
        "with `decoding.keep_candidates`: every scored segment (`parent` is its parent's index in the list, `beside` "
        "the other passages that it read) and every passage read"
    ),
    ("usage",): (
        "`prompt_tokens`, `cached_tokens`, `generated_tokens`, `retrievals` (searches of the index), "
        "`empty_searches` (those that found no passage), `engine_requests`, `truncated_tokens` (cut from passages "
        "that did not fit), `seconds`, of which "
        "`decide_seconds`, `retrieve_seconds`, `rerank_seconds` and `critique_seconds`; `queue_seconds`, "
        "`prefill_seconds` and `decode_seconds` summed over its requests, which run concurrently; all but `seconds` "
        "are 0 if an identical query was answered before; of a carried-over row, only what its searches took"
    ),
    ("carried_from",): "with `stale`: digest of the run whose answer was carried over; null if this run has answered",
    ("error_type", "error_message", "attempts"): "why a row failed, and the number of attempts",
}
# Raised whenever a row of the same columns would get other values, or its file other metadata: 3 since both files of a
# unit carry its summary, 4 since passages have metadata, 5 since rows have searches and may be carried over.
MEANING = 5
RESERVED = frozenset(f.name for f in [*ANSWER_FIELDS, *CANDIDATE_FIELDS, *ERROR_FIELDS])


def hash_columns() -> str:
    """Return a digest of the columns that a run adds and of their meaning; an output holds rows of one digest only."""
    fields = pa.schema([*ANSWER_FIELDS, *CANDIDATE_FIELDS, *ERROR_FIELDS])
    return hashlib.sha256(f"{MEANING} {fields}".encode()).hexdigest()[:12]


def rename_reserved_columns(schema: pa.Schema) -> pa.Schema:
    """Return the input columns as the output names them: a reserved name becomes ``input_NAME``.

    Case does not count, as in DuckDB and Spark, which could not tell ``Answer`` from ``answer``.
    """
    return pa.schema([field.with_name(get_output_name(field.name)) for field in schema])


def get_output_name(name: str) -> str:
    """Return the name in the output of an input column."""
    return f"input_{name}" if name.casefold() in RESERVED else name


def build_data_schema(inputs: pa.Schema, keep_candidates: bool) -> pa.Schema:
    """Return the schema of ``data/*.parquet``."""
    extra = CANDIDATE_FIELDS if keep_candidates else []
    return pa.schema([*rename_reserved_columns(inputs), *ANSWER_FIELDS, *extra])


def build_error_schema(inputs: pa.Schema) -> pa.Schema:
    """Return the schema of ``errors/*.parquet``."""
    return pa.schema([*rename_reserved_columns(inputs), *ERROR_FIELDS])


UNCITED = {"passage_id": None, "citation": None}
UNREAD = dict.fromkeys(field.name for field in BESIDE)


def to_answer_row(answer: Answer) -> dict[str, Any]:
    """Convert an answer to the values of the output columns."""
    segments = []
    for segment, numbers in zip(answer.segments, number_citations(answer.segments), strict=True):
        cited = {"passage_id": segment.passage_id, "citation": numbers[0]} if numbers else UNCITED
        segments.append({**_convert_segment(segment), **cited, "further_citations": list(numbers[1:])})
    return {
        "answer": answer.answer,
        "raw_output": answer.raw_output,
        "retrieved": answer.retrieved,
        "retrieve_probability": answer.retrieve_probability,
        "finish_reason": answer.finish,
        "segments": segments,
        "passages": [_convert_passage(used) for used in list_cited_passages(answer.segments)],
        "searches": [vars(search) for search in answer.searches],
        "usage": vars(answer.usage),
        "carried_from": None,
        "candidates": [_convert_candidate(candidate) for candidate in answer.candidates],
        "evidence": [_convert_passage(read) for read in _list_evidence(answer.candidates)],
    }


def _list_evidence(candidates: Sequence[Candidate]) -> list[RetrievedPassage]:
    read: dict[str, RetrievedPassage] = {}
    for candidate in candidates:
        if (evidence := candidate.segment.evidence) is not None:
            for one in evidence.read:
                read.setdefault(one.passage.id, one)
    return list(read.values())


def _convert_candidate(candidate: Candidate) -> dict[str, Any]:
    segment, boundary = candidate.segment, candidate.boundary
    read = [_convert_read(passage) for passage in segment.evidence.read] if segment.evidence else []
    return {
        **_convert_segment(segment),
        **(read[0] if read else UNREAD),
        "beside": read[1:],
        "parent": candidate.parent,
        "opening": segment.opening,
        "raw": segment.raw,
        "support": segment.critique.support,
        "finish_reason": candidate.finish,
        "next_retrieve_probability": boundary and boundary.probability,
        "next_keeps_evidence": boundary and boundary.keep,
    }


def _convert_segment(segment: Segment) -> dict[str, Any]:
    critique = segment.critique
    return {
        "text": segment.text,
        "is_rel": critique.is_rel,
        "is_sup": critique.is_sup,
        "is_use": critique.is_use,
        "sequence_probability": critique.sequence_probability,
        "score": critique.score,
    }


def _convert_read(read: RetrievedPassage) -> dict[str, Any]:
    return {"passage_id": read.passage.id, **_convert_ranking(read)}


def _convert_passage(used: RetrievedPassage) -> dict[str, Any]:
    passage = used.passage
    return {
        "id": passage.id,
        "title": passage.title,
        "text": passage.text,
        "metadata": passage.metadata,
        **_convert_ranking(used),
    }


def _convert_ranking(found: RetrievedPassage) -> dict[str, Any]:
    return {"retrieval_score": found.score, "rerank_score": found.rerank_score, "rank": found.rank}
