import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml

from pipeline.config.sections import StorageConfig
from pipeline.output.dataset_card import FinishedSet, render_card, render_columns
from pipeline.output.folder import OutputFolder
from pipeline.output.schema import (
    ANSWER_FIELDS,
    CANDIDATE_FIELDS,
    ERROR_FIELDS,
    MEANINGS,
    build_data_schema,
    build_error_schema,
)
from pipeline.storage.location import locate
from tests.jobs.test_rescore import annotated_set

INPUTS = pa.schema([("id", pa.string()), ("query", pa.string()), ("answer", pa.string())])
MANIFEST: dict[str, Any] = {
    "configuration": {"model": {"name": "selfrag/selfrag_llama2_7b", "lora": "adapters/mine"}},
    "settings": {
        "decoding.mode": "adaptive",
        "decoding.weights.support": 2.0,
        "retrieval.search": "",
        "retrieval.encoder": None,
        "model.name": "x",
        "rescored": "s3://b/run",
    },
    "queries": {"files": 2, "rows": 1500, "digest": "b" * 64},
    "model": {"commit": "abc", "lora": "d" * 64},
    "index": {"passages": 21_000_000, "shards": 8, "digest": "c" * 64},
    "encoder": {"name": "BAAI/bge-base-en-v1.5", "revision": "r1", "digest": "e" * 64},
    "tasks": {"popqa": {"rows": 1400}, "": {"rows": 100}},
    "versions": {"selfrag-batch": "0.1.0", "vllm": "0.32.0"},
    "finished": "2025-11-23T10:00:00.123456+00:00",
    "counts": {"rows": 1500, "errors": 3, "error_types": {"TimeoutError": 3}, "retrieved": 900},
}


def card(manifest: dict[str, Any] | None = None, errors: bool = True, licence: str | None = "cc-by-sa-4.0") -> str:
    schemas = {"data": build_data_schema(INPUTS, keep_candidates=False), "errors": build_error_schema(INPUTS)}
    found = FinishedSet({**MANIFEST, **(manifest or {})}, schemas if errors else {"data": schemas["data"]})
    return render_card(found, "me/answers", licence)


def front_matter(text: str) -> dict[str, Any]:
    return dict(yaml.safe_load(text.split("---\n")[1]))


def test_card_names_the_reranker_that_was_used() -> None:
    rerank = {"model": "cross-encoder/ms-marco-MiniLM-L6-v2", "revision": "r2"}
    configuration = {**MANIFEST["configuration"], "retrieval": {"rerank": rerank}}
    used = card({"configuration": configuration, "reranker": {"digest": "f" * 64}})
    assert "| reranker | cross-encoder/ms-marco-MiniLM-L6-v2 (revision r2, digest ffffffffffff) |" in used
    assert "| reranker |" not in card({"configuration": configuration, "reranker": None})


def test_card_names_the_run_whose_answers_were_carried_over() -> None:
    counts = {**MANIFEST["counts"], "carried": 1200}
    found = card({"counts": counts, "stale": {"run": "e" * 64, "index": "i"}})
    assert "| carried over | 1,200 answers of an earlier run (digest eeeeeeeeeeee) |" in found
    assert "| carried over |" not in card()


def test_card_says_that_the_rows_are_a_sample() -> None:
    assert "| queries | a sample of 1,500 of 2,000,000 rows (digest bbbbbbbbbbbb) |" in card({"population": 2_000_000})
    assert "| queries | 1,500 rows (digest bbbbbbbbbbbb) |" in card()


def test_front_matter_describes_how_to_load_the_set() -> None:
    found = front_matter(card())
    assert found["configs"] == [
        {"config_name": "data", "data_files": "data/*.parquet", "default": True},
        {"config_name": "errors", "data_files": "errors/*.parquet"},
    ]
    assert (found["license"], found["size_categories"]) == ("cc-by-sa-4.0", ["1K<n<10K"])
    features = {info["config_name"]: info["features"] for info in found["dataset_info"]}
    assert features["data"][:3] == [{"name": name, "dtype": "string"} for name in ("id", "query", "input_answer")]
    assert features["errors"][-1] == {"name": "attempts", "dtype": "int32"}
    assert 'load_dataset("me/answers", "errors", split="train")' in card()


def test_missing_errors_and_license_are_omitted() -> None:
    found = front_matter(text := card(errors=False, licence=None))
    assert [config["config_name"] for config in found["configs"]] == ["data"]
    assert "license" not in found
    assert '"errors"' not in text
    assert "This card does not state a license." in text


@pytest.mark.parametrize(
    ("rows", "size"),
    [(999, "n<1K"), (1000, "1K<n<10K"), (99_999, "10K<n<100K"), (1_000_000, "1M<n<10M"), (10**12, "1B<n<10B")],
)
def test_size_is_a_category_of_the_hub(rows: int, size: str) -> None:
    assert front_matter(card({"counts": {**MANIFEST["counts"], "rows": rows + 3}}))["size_categories"] == [size]


def test_card_describes_what_produced_the_set() -> None:
    text = card()
    for line in (
        "| model | selfrag/selfrag_llama2_7b (revision abc) |",
        "| adapter | adapters/mine (digest dddddddddddd) |",
        "| index | 21,000,000 passages (digest cccccccccccc) |",
        "| encoder | BAAI/bge-base-en-v1.5 (revision r1, digest eeeeeeeeeeee) |",
        "| queries | 1,500 rows (digest bbbbbbbbbbbb) |",
        "| tasks | `popqa` 1,400, none 100 |",
        "| outcome | 1,497 answered, 3 failed, 900 with a passage |",
        "| versions | selfrag-batch 0.1.0, vllm 0.32.0 |",
        "| finished | 2025-11-23T10:00:00 |",
        "- 3 rows failed and have no answer (TimeoutError 3).",
    ):
        assert f"{line}\n" in text
    assert "`decoding.mode=adaptive`, `decoding.weights.support=2.0`, `rescored=s3://b/run`. Task" in text


def test_card_of_a_run_without_an_index_omits_it() -> None:
    text = card({"index": None, "encoder": None})
    assert "| index" not in text
    assert "| encoder" not in text


def test_every_output_column_has_a_description() -> None:
    fields = [*ANSWER_FIELDS, *CANDIDATE_FIELDS, *ERROR_FIELDS]
    assert {name for names in MEANINGS for name in names} == {field.name for field in fields}


def test_documentation_and_card_describe_the_same_columns() -> None:
    document = (Path(__file__).parents[3] / "infra" / "DATA.md").read_text("utf-8")
    plain = re.sub(r" \(\[[^]]*\]\([^)]*\)\)", "", document)  # links only work there
    for row in render_columns(build_data_schema(pa.schema([]), keep_candidates=True)).splitlines()[2:]:
        assert f"{row}\n" in plain


def test_only_finished_sets_have_a_card(tmp_path: Path) -> None:
    folder = annotated_set(tmp_path / "run", rows=2)
    found = FinishedSet.of(OutputFolder(locate(str(folder), StorageConfig())))
    assert (found.answered, list(found.schemas)) == (2, ["data", "errors"])
    (folder / "_SUCCESS").unlink()
    with pytest.raises(ValueError, match="run: not a finished annotated set"):
        FinishedSet.of(OutputFolder(locate(str(folder), StorageConfig())))
