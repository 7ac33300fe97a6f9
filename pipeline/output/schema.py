"""Arrow at the border: rows in → Query, Answer → rows out. The output's nested types are constants."""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from pipeline.config.run import Columns
from pipeline.decoding.choose import citation_numbers, cited_passages
from pipeline.decoding.types import Answer, Candidate, Passage, Query, RetrievedPassage, Segment

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
        *CRITIQUE_FIELDS,
    ]
)
# Everything that choosing again needs: candidates are a tree, and ``parent`` is a place in the same list.
CANDIDATE = pa.struct(
    [
        pa.field("parent", pa.int32()),
        pa.field("opening", pa.string()),
        pa.field("text", pa.string()),
        pa.field("raw", pa.string()),
        pa.field("passage_id", pa.string()),
        pa.field("retrieval_score", pa.float64()),
        pa.field("rank", pa.int32()),
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
        pa.field("retrieval_score", pa.float64()),
        pa.field("rank", pa.int32()),
    ]
)
USAGE = pa.struct(
    [
        pa.field("prompt_tokens", pa.int64()),
        pa.field("cached_tokens", pa.int64()),
        pa.field("generated_tokens", pa.int64()),
        pa.field("retrievals", pa.int32()),
        pa.field("engine_requests", pa.int32()),
        pa.field("truncated_tokens", pa.int32()),
        pa.field("seconds", pa.float64()),
        pa.field("decide_seconds", pa.float64()),
        pa.field("retrieve_seconds", pa.float64()),
        pa.field("critique_seconds", pa.float64()),
        pa.field("queue_seconds", pa.float64()),
        pa.field("prefill_seconds", pa.float64()),
        pa.field("decode_seconds", pa.float64()),
    ]
)
ANSWER_FIELDS = [
    pa.field("answer", pa.string()),
    pa.field("raw_output", pa.string()),
    pa.field("retrieved", pa.bool_()),
    pa.field("retrieve_probability", pa.float64()),
    pa.field("finish_reason", pa.string()),
    pa.field("segments", pa.list_(SEGMENT)),
    pa.field("passages", pa.list_(PASSAGE)),
    pa.field("usage", USAGE),
]
# On request: every scored candidate, and every passage that was read, once.
CANDIDATE_FIELDS = [pa.field("candidates", pa.list_(CANDIDATE)), pa.field("evidence", pa.list_(PASSAGE))]
ERROR_FIELDS = [
    pa.field("error_type", pa.string()),
    pa.field("error_message", pa.string()),
    pa.field("attempts", pa.int32()),
]
# What the output's columns mean, for people: the dataset card shows it, and a test holds the README to it.
MEANINGS: Mapping[tuple[str, ...], str] = {
    ("answer", "raw_output"): "without and with reflection tokens",
    ("retrieved", "retrieve_probability"): (
        "whether a passage was used; p(Retrieval) over p(Retrieval) + p(No Retrieval), null where the mode decided"
    ),
    ("finish_reason",): "why it ends there: `stop`, `segments`, `length`, `room` or `constraint`",
    ("segments",): (
        "`text`, `passage_id`, `citation` (place in `passages`), `is_rel` = p(Relevant), `is_sup` = p(Fully) + 0.5 "
        "p(Partially), `is_use` in −1 … 1, `sequence_probability`, `score`; a group that the model never wrote is null"
    ),
    ("passages",): "those the answer used: `id`, `title`, `text`, `retrieval_score`, `rank`",
    ("candidates", "evidence"): (
        "with `decoding.keep_candidates`: every scored segment (`parent` is its place in the tree) and every "
        "passage read"
    ),
    ("usage",): (
        "`prompt_tokens`, `cached_tokens`, `generated_tokens`, `retrievals` (searches of the index), "
        "`engine_requests`, `truncated_tokens` (cut from passages that did not fit), `seconds`, of which "
        "`decide_seconds`, `retrieve_seconds` and `critique_seconds`; `queue_seconds`, `prefill_seconds` and "
        "`decode_seconds` summed over its requests, which run side by side; all but `seconds` 0 where an equal query "
        "had been answered before"
    ),
    ("error_type", "error_message", "attempts"): "why a row failed, and how often it was tried",
}
RESERVED = frozenset(f.name for f in [*ANSWER_FIELDS, *CANDIDATE_FIELDS, *ERROR_FIELDS])


def columns_digest() -> str:
    """Digest of the columns that a run adds: rows of other columns do not go into one output."""
    fields = pa.schema([*ANSWER_FIELDS, *CANDIDATE_FIELDS, *ERROR_FIELDS])
    return hashlib.sha256(str(fields).encode()).hexdigest()[:12]


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _is_passages(kind: pa.DataType) -> bool:
    if not (_is_list(kind) and pa.types.is_struct(kind.value_type)):
        return False
    fields = {field.name: field.type for field in kind.value_type}
    return {"id", "text"} <= fields.keys() and all(_is_text(fields[n]) for n in ("id", "title", "text") if n in fields)


def _is_texts(kind: pa.DataType) -> bool:
    return _is_list(kind) and _is_text(kind.value_type)


# What a query set may hold; other columns pass through.
QUERY_FIELDS = pa.schema(
    [
        pa.field("id", pa.string()),
        pa.field("query", pa.string()),
        pa.field("input", pa.string()),
        pa.field("task", pa.string()),
        pa.field("choices", pa.list_(pa.string())),
        pa.field("answers", pa.list_(pa.string())),
        pa.field("short_answers", pa.list_(pa.list_(pa.string()))),
        pa.field("gold_passage_id", pa.string()),
        pa.field("passages", pa.list_(pa.struct([(name, pa.string()) for name in ("id", "title", "text")]))),
    ]
)
TypeCheck = tuple[Callable[[pa.DataType], bool], str]
# What answers are judged by; the evaluation reads these columns.
GOLD_TYPES: Mapping[str, TypeCheck] = {
    "answers": (_is_texts, "list<string>"),
    "short_answers": (lambda kind: _is_list(kind) and _is_texts(kind.value_type), "list<list<string>>"),
    "gold_passage_id": (_is_text, "string"),
}


def check_types(schema: pa.Schema, wanted: Mapping[str, TypeCheck], source: str) -> None:
    """Check the columns that are there; a column of nulls has no type yet.

    Raises:
        ValueError: one is of another type than wanted.
    """
    for column, (fits, name) in wanted.items():
        if column in schema.names and not pa.types.is_null(kind := schema.field(column).type) and not fits(kind):
            raise ValueError(f"{source}: column {column!r} is {kind}, expected {name}")


def check_query_schema(schema: pa.Schema, columns: Columns, source: str) -> None:
    """Check a query set's columns.

    Raises:
        ValueError: a column is missing, of the wrong type, or stands where an output column must go.
    """
    for column in (columns.id, columns.query):
        if column not in schema.names:
            raise ValueError(
                f"{source}: no column {column!r}; it has {', '.join(schema.names) or 'none'} "
                "(columns can be mapped: --set columns.query=NAME)"
            )
    for name, count in Counter(schema.names).items():
        if count > 1:
            raise ValueError(f"{source}: {count} columns are named {name!r}")
    wanted: dict[str, TypeCheck] = {
        columns.id: (_is_text, "string"),
        columns.query: (_is_text, "string"),
        columns.input: (_is_text, "string"),
        columns.task: (_is_text, "string"),
        columns.choices: (_is_texts, "list<string>"),
        columns.passages: (_is_passages, "list<struct<id: string, title: string, text: string>>"),
        **GOLD_TYPES,
    }
    check_types(schema, wanted, source)
    for name in schema.names:
        if name in RESERVED and f"input_{name}" in schema.names:
            raise ValueError(f"{source}: columns {name!r} and 'input_{name}' would both be written as 'input_{name}'")


def passed_through(schema: pa.Schema) -> pa.Schema:
    """Input columns as the output has them: one whose name the output needs becomes ``input_NAME``."""
    names = [f"input_{name}" if name in RESERVED else name for name in schema.names]
    return pa.schema([field.with_name(name) for field, name in zip(schema, names, strict=True)])


def data_schema(inputs: pa.Schema, keep_candidates: bool) -> pa.Schema:
    """Schema of ``data/*.parquet``."""
    extra = CANDIDATE_FIELDS if keep_candidates else []
    return pa.schema([*passed_through(inputs), *ANSWER_FIELDS, *extra])


def error_schema(inputs: pa.Schema) -> pa.Schema:
    """Schema of ``errors/*.parquet``."""
    return pa.schema([*passed_through(inputs), *ERROR_FIELDS])


Row = dict[str, Any] | UnicodeDecodeError


def read_rows(table: pa.Table) -> list[Row]:
    """Rows as Python has them; an error in the place of one whose text is not UTF-8, which Arrow does not check."""
    try:
        return list(table.to_pylist())
    except UnicodeDecodeError:
        return [_read_row(table.slice(n, 1)) for n in range(table.num_rows)]


def _read_row(table: pa.Table) -> Row:
    try:
        (row,) = table.to_pylist()
    except UnicodeDecodeError as error:
        return error
    return dict(row)


def query_of(row: Mapping[str, Any], columns: Columns) -> Query:
    """One input row as a query; absent columns and nulls mean the same.

    Raises:
        ValueError: a choice is null, or a given passage cannot be told from another.
    """
    given = row.get(columns.passages)
    choices = tuple(row.get(columns.choices) or ())
    if None in choices:
        raise ValueError("a choice is null")
    passages = _given(given) if given else None
    return Query(
        id=row[columns.id],
        query=row[columns.query] or "",
        input=row.get(columns.input),
        task=row.get(columns.task),
        choices=choices,
        passages=passages,
    )


def _given(rows: Sequence[Mapping[str, Any] | None]) -> tuple[Passage, ...]:
    """Given passages.

    Raises:
        ValueError: one is null, has no id, or has another's.
    """
    passages: dict[str, Passage] = {}
    for place, row in enumerate(rows):
        if row is None or row["id"] is None:
            raise ValueError(f"given passage {place} is null or has no id")
        if row["id"] in passages:
            raise ValueError(f"two given passages have the id {row['id']!r}")
        passages[row["id"]] = Passage(row["id"], row.get("title") or "", row["text"] or "")
    return tuple(passages.values())


def answer_row(answer: Answer) -> dict[str, Any]:
    """An answer as the values of the output columns."""
    return {
        "answer": answer.answer,
        "raw_output": answer.raw_output,
        "retrieved": answer.retrieved,
        "retrieve_probability": answer.retrieve_probability,
        "finish_reason": answer.finish,
        "segments": [
            {**_scores(segment), "citation": number}
            for segment, number in zip(answer.segments, citation_numbers(answer.segments), strict=True)
        ],
        "passages": [_passage(used) for used in cited_passages(answer.segments)],
        "usage": vars(answer.usage),
        "candidates": [_candidate(candidate) for candidate in answer.candidates],
        "evidence": [_passage(read) for read in _read(answer.candidates)],
    }


def _read(candidates: Sequence[Candidate]) -> list[RetrievedPassage]:
    read: dict[str, RetrievedPassage] = {}
    for candidate in candidates:
        if (evidence := candidate.segment.evidence) is not None:
            read.setdefault(evidence.passage.id, evidence)
    return list(read.values())


def _candidate(candidate: Candidate) -> dict[str, Any]:
    segment, boundary = candidate.segment, candidate.boundary
    return {
        **_scores(segment),
        "parent": candidate.parent,
        "opening": segment.opening,
        "raw": segment.raw,
        "retrieval_score": segment.evidence and segment.evidence.score,
        "rank": segment.evidence and segment.evidence.rank,
        "support": segment.critique.support,
        "finish_reason": candidate.finish,
        "next_retrieve_probability": boundary and boundary.probability,
        "next_keeps_evidence": boundary and boundary.keep,
    }


def _scores(segment: Segment) -> dict[str, Any]:
    critique = segment.critique
    return {
        "text": segment.text,
        "passage_id": segment.evidence and segment.evidence.passage.id,
        "is_rel": critique.is_rel,
        "is_sup": critique.is_sup,
        "is_use": critique.is_use,
        "sequence_probability": critique.sequence_probability,
        "score": critique.score,
    }


def _passage(used: RetrievedPassage) -> dict[str, Any]:
    passage = used.passage
    return {
        "id": passage.id,
        "title": passage.title,
        "text": passage.text,
        "retrieval_score": used.score,
        "rank": used.rank,
    }
