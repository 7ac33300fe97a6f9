"""Annotated sets written row by row, as a run leaves them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.config.run import RunConfig
from pipeline.config.sections import StorageConfig
from pipeline.decoding.profiles import Tasks
from pipeline.output.folder import OutputFolder
from pipeline.output.unit_files import Work, split_failed
from pipeline.run.annotation import build_annotated_schema
from pipeline.storage.location import Location, locate

INPUTS = pa.schema([("id", pa.string()), ("query", pa.string()), ("task", pa.string())])
Row = dict[str, Any]
USAGE = {
    "prompt_tokens": 100,
    "cached_tokens": 25,
    "generated_tokens": 10,
    "retrievals": 1,
    "engine_requests": 6,
    "truncated_tokens": 0,
    "seconds": 4.0,
    "decide_seconds": 0.5,
    "retrieve_seconds": 0.5,
    "critique_seconds": 0.25,
    "queue_seconds": 1.0,
    "prefill_seconds": 2.0,
    "decode_seconds": 5.0,
}
PASSAGE = {"id": "p1", "title": "Dune", "text": "Dune is a novel by Frank Herbert.", "retrieval_score": 0.7, "rank": 2}


def at(location: Path | str) -> Location:
    return locate(str(location), StorageConfig())


def segment(score: float, text: str = "Frank Herbert", **scores: float | None) -> Row:
    known = {"is_rel": 0.9, "is_sup": 0.8, "is_use": 0.5, "sequence_probability": 0.7}
    return {"text": text, "passage_id": "p1", "citation": 1, **known, **scores, "score": score}


def answered(id_: str, score: float = 2.0, task: str | None = None, **values: Any) -> Row:
    """A row answered from one passage."""
    row: Row = {"id": id_, "query": f"Who wrote {id_}?", "task": task, "answer": "Frank Herbert", "raw_output": ""}
    row |= {"retrieved": True, "retrieve_probability": 0.9, "finish_reason": "stop", "segments": [segment(score)]}
    return {**row, "passages": [PASSAGE], "usage": USAGE, **values}


def unread(id_: str, score: float = 1.0, **values: Any) -> Row:
    """A row answered without a passage."""
    alone = {**segment(score, is_rel=None, is_sup=None), "passage_id": None, "citation": None}
    without = {"retrieved": False, "retrieve_probability": 0.1, "segments": [alone], "passages": []}
    return answered(id_, **{**without, "usage": {**USAGE, "retrievals": 0, "retrieve_seconds": 0.0}, **values})


def failed(id_: str, kind: str = "ValueError", message: str = "the query is empty", task: str | None = None) -> Row:
    row = {"id": id_, "query": "", "task": task}
    return {**row, "error_type": kind, "error_message": message, "attempts": 1}


def write_set(
    folder: Path | Location,
    *units: Sequence[Row],
    times: Sequence[tuple[float, float]] | None = None,
    finished: bool = True,
    settings: Row | None = None,
) -> OutputFolder:
    """A set of these units.

    Args:
        times: when each unit was begun and ended; unknown by default.
        settings: of the run, by section.
    """
    output = OutputFolder(folder if isinstance(folder, Location) else at(folder))
    minimal = {"queries": "q", "output": output.location.uri, "model": {"name": "m"}}
    config = RunConfig.model_validate({**minimal, **(settings or {})})
    schema = build_annotated_schema(INPUTS, keep_candidates=False)
    tasks = Tasks(config.decoding, config.profiles)
    names = {row["task"] or "" for rows in units for row in rows}
    manifest = {
        "configuration": config.to_record(),
        "settings": config.get_fixed_settings(),
        "queries": {"files": 1, "rows": sum(map(len, units)), "digest": "d"},
        "model": {"digest": "0123456789abcdef", "lora": None},
        "index": {"passages": 1271, "shards": 2, "digest": "fedcba9876543210"},
        "encoder": {"name": "MiniLM", "revision": None, "digest": "abcdef0123456789"},
        "tasks": {name: {"rows": 1, **tasks.describe(name)} for name in names},
        "versions": {"ray": "2.60.0"},
        "started": "2025-01-01T00:00:00+00:00",
    }
    output.begin(manifest)
    written = []
    for number, rows in enumerate(units):
        table = pa.Table.from_pylist(list(rows), schema=schema)
        work = Work(*times[number]) if times else Work()
        files = split_failed(table, INPUTS, keep_candidates=False)
        written.append(output.write_unit(f"{number:020x}", *files, "", work))
    if finished:
        output.finish(manifest, written)
    return output
