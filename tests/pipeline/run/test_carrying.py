"""Two runs of one unit, without an engine; the index changes in between."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.run import RunConfig
from pipeline.decoding.profiles import Tasks
from pipeline.decoding.reflection_reader import ReflectionCritic
from pipeline.decoding.self_rag import SelfRag
from pipeline.decoding.types import Passage, Retrieved, RetrievedPassage
from pipeline.output.unit_files import UnitSummary
from pipeline.retrieval.shard_servers import IndexLostError
from pipeline.run.actor import SelfRagActor
from pipeline.run.annotation import OneByOne
from pipeline.run.attempts import Attempts
from pipeline.run.carrying import CarryingOver
from pipeline.run.earlier_set import EarlierSet
from pipeline.run.finished_rows import FinishedRows
from tests.support.actors import CONFIG, Folder, LocalHandle, actor
from tests.support.fakes import ScriptedGenerator, generation, word_tokenizer

RUN: RunConfig = CONFIG.model_copy(
    update={"decoding": CONFIG.decoding.model_copy(update={"mode": "always", "passages": 2})}
)
QUERIES = {"a": "alpha", "b": "beta", "c": "gamma", "d": "delta"}
TEXTS: dict[str, list[str] | Exception] = {
    "alpha": ["one", "two"],
    "beta": ["three"],
    "gamma": [],
    "delta": ["four", "five", "six"],
}
TABLE = pa.table({"id": list(QUERIES), "query": list(QUERIES.values()), "answer": ["before"] * 4})


@dataclass
class ScriptedIndex:
    """Passages by the query; an exception is raised."""

    texts: Mapping[str, Sequence[str] | Exception]
    asked: list[tuple[str, int]] = field(default_factory=list)

    async def retrieve(self, query: str, k: int, condition: str | None = None) -> Retrieved:
        self.asked.append((query, k))
        found = self.texts[query]
        if isinstance(found, Exception):
            raise found
        await asyncio.sleep(0)
        passages = [Passage(text, "", text) for text in found[:k]]
        return Retrieved([RetrievedPassage(p, 1.0, rank) for rank, p in enumerate(passages, 1)])


async def annotate(folder: Folder, index: ScriptedIndex, earlier: EarlierSet | None = None) -> tuple[UnitSummary, list]:
    """Annotate the unit; returns its summary, and the prompts that the engine has seen."""
    tokenizer = word_tokenizer()

    def script(prompt: str) -> Any:
        found = prompt.partition("<paragraph>")[2].split("</paragraph>")[0].split()
        return generation(tokenizer, ["[Relevant]", found[-1] if found else "nothing", "</s>"])

    generator = ScriptedGenerator(tokenizer, script)
    made = actor(LocalHandle(Attempts(9, "run")), [])
    made.config, made.run = RUN, "later" if earlier else "earlier"
    made.system = SelfRag(generator, ReflectionCritic(tokenizer), Tasks(RUN.decoding), index)
    made.carrying = CarryingOver(earlier, index, RUN) if earlier else None
    summary = await folder.annotate(made)
    assert summary is not None
    return summary, generator.prompts


def read(folder: Folder) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in pq.read_table(Path(folder.output.location.path) / "data").to_pylist()}


@pytest.fixture
async def first(tmp_path: Path) -> Folder:
    folder = Folder(tmp_path / "first", TABLE)
    await annotate(folder, ScriptedIndex(TEXTS))
    return folder


def earlier(folder: Folder, run: str = "earlier") -> EarlierSet:
    return EarlierSet(folder.output, run, "id")


async def test_only_rows_whose_searches_find_others_are_answered_again(first: Folder, tmp_path: Path) -> None:
    """A passage of alpha is gone, gamma has one now, and delta's third, which nobody reads, has another text."""
    texts = {**TEXTS, "alpha": ["two"], "gamma": ["seven"], "delta": ["four", "five", "changed"]}
    second, index = Folder(tmp_path / "second", TABLE), ScriptedIndex(texts)
    summary, prompts = await annotate(second, index, earlier(first))
    assert (summary.rows, summary.carried, summary.failed) == (4, 2, 0)
    assert len(prompts) == 2  # one passage for alpha, one for gamma
    before, after = read(first), read(second)
    assert {name: row["carried_from"] for name, row in after.items()} == {
        "a": None,
        "b": "earlier",
        "c": None,
        "d": "earlier",
    }
    for name in "bd":
        assert after[name]["usage"]["engine_requests"] == 0
        assert after[name]["usage"]["retrievals"] == 1
        same = ("answer", "segments", "passages", "searches", "retrieved", "finish_reason", "input_answer")
        assert {key: after[name][key] for key in same} == {key: before[name][key] for key in same}
    assert [after[name]["answer"] for name in "ac"] == ["two", "seven"]
    assert before["c"]["answer"] == "nothing"
    assert {k for _, k in index.asked} == {2}


async def test_nothing_is_generated_if_nothing_has_changed(first: Folder, tmp_path: Path) -> None:
    second = Folder(tmp_path / "second", TABLE)
    summary, prompts = await annotate(second, ScriptedIndex(TEXTS), earlier(first))
    assert (summary.carried, summary.prompt_tokens, prompts) == (4, 0, [])
    assert read(second)["c"]["usage"]["empty_searches"] == 1


async def test_provenance_is_that_of_the_run_that_answered(first: Folder, tmp_path: Path) -> None:
    second, third = Folder(tmp_path / "second", TABLE), Folder(tmp_path / "third", TABLE)
    await annotate(second, ScriptedIndex({**TEXTS, "beta": ["x"]}), earlier(first))
    await annotate(third, ScriptedIndex({**TEXTS, "beta": ["x"], "alpha": []}), earlier(second, "later"))
    found = {name: row["carried_from"] for name, row in read(third).items()}
    assert found == {"a": None, "b": "later", "c": "earlier", "d": "earlier"}


async def test_rows_one_by_one_are_answered(first: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After crashes, of which a search may be the cause, each row is begun on its own."""
    monkeypatch.setattr(SelfRagActor, "_choose_way", lambda made, unit, _: OneByOne(made.attempts, unit))
    second = Folder(tmp_path / "second", TABLE)
    summary, prompts = await annotate(second, ScriptedIndex(TEXTS), earlier(first))
    assert (summary.rows, summary.carried, len(prompts)) == (4, 0, 6)


async def test_rows_that_an_earlier_attempt_has_answered_stay(first: Folder, tmp_path: Path) -> None:
    found = CarryingOver(earlier(first), ScriptedIndex(TEXTS), RUN)
    finished = FinishedRows()
    finished.outcomes[2] = {"answer": "answered"}
    await found.carry_over(first.unit.id, TABLE, finished)
    assert finished.outcomes[2] == {"answer": "answered"}
    assert sorted(finished.outcomes) == [0, 1, 2, 3]


async def test_failed_search_is_left_to_the_row(first: Folder, tmp_path: Path) -> None:
    second = Folder(tmp_path / "second", TABLE)
    texts = {**TEXTS, "beta": ValueError("no search")}
    summary, _ = await annotate(second, ScriptedIndex(texts), earlier(first))
    assert (summary.carried, summary.errors) == (3, {"ValueError": 1})
    assert second.errors()[0]["error_message"] == "no search"


async def test_lost_index_fails_no_row(first: Folder, tmp_path: Path) -> None:
    second = Folder(tmp_path / "second", TABLE)
    with pytest.raises(IndexLostError):
        await annotate(second, ScriptedIndex({**TEXTS, "beta": IndexLostError("gone")}), earlier(first))
    assert not (Path(second.output.location.path) / "data").exists()


async def test_failed_rows_of_the_earlier_set_are_answered(tmp_path: Path) -> None:
    first, second = Folder(tmp_path / "first", TABLE), Folder(tmp_path / "second", TABLE)
    await annotate(first, ScriptedIndex({**TEXTS, "beta": ValueError("no search")}))
    summary, prompts = await annotate(second, ScriptedIndex(TEXTS), earlier(first))
    assert (summary.carried, summary.failed, len(prompts)) == (3, 0, 1)
    assert read(second)["b"]["answer"] == "three"


@pytest.mark.parametrize("damage", ["run", "missing", "cut"])
async def test_unit_without_a_sound_earlier_one_is_answered(first: Folder, tmp_path: Path, damage: str) -> None:
    second = Folder(tmp_path / "second", TABLE)
    (file,) = (Path(first.output.location.path) / "data").iterdir()
    if damage == "missing":
        file.unlink()
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-9])
    found = earlier(first, "another" if damage == "run" else "earlier")
    summary, _ = await annotate(second, ScriptedIndex(TEXTS), found)
    assert (summary.rows, summary.carried, summary.failed) == (4, 0, 0)
