"""The rows that a dry run tries the tokenizer on, and its warning."""

import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import AddedToken

from pipeline.config.run import RunConfig
from pipeline.decoding.reflection import CONTROL_TOKENS
from pipeline.run.dry_run import CHECKED_ROWS, check_prompts, read_first_queries
from pipeline.run.plan import RunPlan, check_run
from tests.support.tokenizers import load_folder, write_llama

PASSAGES = [{"id": "p", "title": "", "text": " Al Gore"}]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with a model's configuration and tokenizer, without weights."""
    folder = write_llama(tmp_path / "model", legacy=False)
    tokenizer = load_folder(folder)
    tokenizer.add_tokens(list(CONTROL_TOKENS), special_tokens=True)
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    return folder


def plan(folder: Path, model: Path, rows: list[dict[str, Any]], **settings: Any) -> RunPlan:
    pq.write_table(pa.Table.from_pylist(rows), folder / "queries.parquet")
    run = {"queries": str(folder / "queries.parquet"), "output": str(folder / "run"), "model": {"name": str(model)}}
    return check_run(RunConfig.model_validate({**run, **settings, "decoding": {"mode": "never"}}))


def test_the_first_rows_are_tried_with_the_instruction_of_their_task(tmp_path: Path, model: Path) -> None:
    rows = [{"id": str(n), "query": f"Is {n} odd?", "task": "law"} for n in range(20)]
    planned = plan(tmp_path, model, rows, profiles={"law": {"instruction": "Answer for a lawyer: {query}"}})
    queries = list(read_first_queries(planned))
    assert [query.id for query in queries] == [str(n) for n in range(CHECKED_ROWS)]
    assert queries[1].instruction == "Answer for a lawyer: Is 1 odd?"


def test_rows_that_a_run_rejects_are_left_out(tmp_path: Path, model: Path) -> None:
    twice = [{"id": "p", "title": "", "text": "a"}, {"id": "p", "title": "", "text": "b"}]
    rows = [{"id": "a", "query": "Who?", "passages": twice}, {"id": "b", "query": "Who?", "passages": PASSAGES}]
    assert [query.id for query in read_first_queries(plan(tmp_path, model, rows))] == ["b"]


def test_nothing_is_said_of_a_tokenizer_that_agrees(tmp_path: Path, model: Path, caplog) -> None:
    check_prompts(plan(tmp_path, model, [{"id": "a", "query": "Who?", "passages": PASSAGES}]))
    assert caplog.messages == []


def test_a_tokenizer_that_disagrees_is_one_line(tmp_path: Path, model: Path, caplog) -> None:
    tokenizer = load_folder(write_llama(tmp_path / "other", legacy=False))
    tokenizer.add_tokens([AddedToken(t, special=True, rstrip=True, normalized=False) for t in CONTROL_TOKENS])
    tokenizer.save_pretrained(model)
    with caplog.at_level(logging.WARNING):
        check_prompts(plan(tmp_path, model, [{"id": "a", "query": "Who?", "passages": PASSAGES}]))
    (line,) = caplog.messages
    assert line.startswith(
        f"model {model}: the prompt of row 'a' with passage 'p' has other tokens than the strings on which"
    )
    assert "\n" not in line
    assert "'▁Al' '▁G' 'ore' instead of 'Al' '▁G' 'ore'" in line
    assert line.endswith("or set model.engine.tokenizer")
