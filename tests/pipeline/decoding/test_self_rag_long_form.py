"""The segment beam from prompts to answers, through a scripted engine: trees of three levels worked out by hand."""

import asyncio
import random
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest

from pipeline.config.sections import DecodingConfig
from pipeline.decoding.choose import list_cited_passages
from pipeline.decoding.profiles import Tasks
from pipeline.decoding.reflection_reader import ReflectionCritic
from pipeline.decoding.self_rag import SelfRag
from pipeline.decoding.types import Answer, Generation, Passage, Query, Retrieved, RetrievedPassage
from tests.support.fakes import (
    DrawingGenerator,
    DrawingRetriever,
    ScriptedGenerator,
    generation,
    judged,
    word_tokenizer,
)

TOKENIZER = word_tokenizer()
QUESTION = "### Instruction: Tell ### Response:"
RED, BLUE = Passage("red", "", "red"), Passage("blue", "", "blue")


@dataclass
class Finds:
    """A retriever of passages by what is asked; records it."""

    found: Mapping[str, list[Passage]]
    asked: list[str]

    async def retrieve(self, query: str, k: int, condition: str | None = None):
        self.asked.append(query)
        return Retrieved([RetrievedPassage(p, 1.0 / n, n) for n, p in enumerate(self.found[query][:k], 1)])


DECIDES = generation(TOKENIZER, ["[Retrieval]"], {0: {"[Retrieval]": 0.9, "[No Retrieval]": 0.1}}, prompt_tokens=4)
FIRST_RED = f"{QUESTION} [Retrieval] <paragraph> red </paragraph>"
FIRST_BLUE = f"{QUESTION} [Retrieval] <paragraph> blue </paragraph>"
# Level 1: red 1.9 (asks again), blue 1.6 (goes on with its passage).
# Level 2: below red, search for "Tell Red is warm." → blue 1.2, red 1.1; blue continues: 1 (no IsRel: 0).
#   Means: red+blue 1.55, red+red 1.5, blue+continued 1.3. The best two go on.
# Level 3: red+blue refuses retrieval: 0.5 (mean 1.2); red+red had ended.
SCRIPT = {
    QUESTION: DECIDES,
    FIRST_RED: judged(TOKENIZER, "Red is warm.", 0.9, "[Retrieval]", p_yes=0.8),
    FIRST_BLUE: judged(TOKENIZER, "Blue is cold.", 0.6, "[Continue to Use Evidence]", p_yes=0.3),
    f"{FIRST_RED} [Relevant] Red is warm. [Retrieval] <paragraph> red </paragraph>": judged(
        TOKENIZER, "Very warm.", 0.1
    ),
    f"{FIRST_RED} [Relevant] Red is warm. [Retrieval] <paragraph> blue </paragraph>": judged(
        TOKENIZER, "Unlike blue.", 0.2, "[No Retrieval]", p_yes=0.1
    ),
    f"{FIRST_BLUE} [Relevant] Blue is cold. [Continue to Use Evidence]": generation(
        TOKENIZER, ["Very", "cold.", "</s>"], prompt_tokens=10
    ),
    f"{FIRST_RED} [Relevant] Red is warm. [Retrieval] <paragraph> blue </paragraph> [Relevant] Unlike blue. "
    "[No Retrieval]": generation(TOKENIZER, [("Mostly.", 0.5), "</s>"], prompt_tokens=10),
}
LONG = DecodingConfig(segments=7, beam_width=2, passages=2)


def system(config: DecodingConfig = LONG, script: Mapping[str, Generation] = SCRIPT) -> SelfRag:
    found = {"Tell": [RED, BLUE], "Tell Red is warm.": [BLUE, RED]}
    generator = ScriptedGenerator(TOKENIZER, lambda prompt: script[prompt])
    return SelfRag(generator, ReflectionCritic(TOKENIZER), Tasks(config), Finds(found, []))


def tell(rag: SelfRag, query: Query = Query("q", "Tell")) -> Answer:
    return asyncio.run(rag.answer(query))


def test_beam_sends_exactly_the_prompts_of_the_tree() -> None:
    rag = system()
    answer = tell(rag)
    assert sorted(rag.generator.prompts) == sorted(SCRIPT)  # type: ignore[attr-defined]
    assert answer.answer == "Red is warm. Very warm."
    assert [s.critique.score for s in answer.segments] == pytest.approx([1.9, 1.1])
    assert answer.raw_output == "[Retrieval][Relevant] Red is warm.[Retrieval][Relevant] Very warm."
    assert rag.retriever.asked == ["Tell", "Tell Red is warm."]  # type: ignore[union-attr]
    assert (answer.usage.retrievals, answer.usage.engine_requests) == (2, 7)
    assert answer.usage.prompt_tokens == 4 + 6 * 10


def test_citations_follow_the_passages_of_the_kept_segments() -> None:
    answer = tell(system(LONG.model_copy(update={"citations": True, "segments": 2})))
    assert answer.answer == "Red is warm. [1] Unlike blue. [2]"  # two segments at most: 1.55 beats 1.5
    assert [used.passage.id for used in list_cited_passages(answer.segments)] == ["red", "blue"]


def test_continue_token_keeps_the_passage_without_a_search() -> None:
    script = {**SCRIPT, FIRST_RED: judged(TOKENIZER, "Red.", 0.05)}
    rag = system(LONG.model_copy(update={"citations": True, "beam_width": 1}), script)
    answer = tell(rag)
    assert answer.answer == "Blue is cold. [1] Very cold. [1]"
    assert rag.retriever.asked == ["Tell"]  # type: ignore[union-attr]
    assert answer.segments[1].critique.is_rel is None


def test_static_search_retrieves_once_per_row() -> None:
    rag = system(LONG.model_copy(update={"search": "static"}))
    answer = tell(rag)
    assert rag.retriever.asked == ["Tell"]  # type: ignore[union-attr]
    assert answer.usage.retrievals == 1


def test_given_passages_are_read_at_every_boundary() -> None:
    rag = replace(system(), retriever=None)
    assert tell(rag, Query("q", "Tell", passages=(RED, BLUE))).answer == "Red is warm. Very warm."


def test_never_mode_does_not_retrieve_at_boundaries() -> None:
    alone = f"{QUESTION} [No Retrieval]"
    script = {
        alone: generation(TOKENIZER, ["One.", "[Retrieval]"], {1: {"[Retrieval]": 0.9}}),
        f"{alone} One. [No Retrieval]": generation(TOKENIZER, ["Two.", "</s>"]),
    }
    answer = tell(system(LONG.model_copy(update={"mode": "never"}), script))
    assert (answer.answer, answer.retrieved, answer.usage.retrievals) == ("One. Two.", False, 0)


def test_always_mode_retrieves_at_every_boundary() -> None:
    first = f"{QUESTION} [Retrieval] <paragraph> red </paragraph>"
    second = f"{first} [Relevant] One. [Retrieval] <paragraph> red </paragraph>"
    script = {
        first: judged(TOKENIZER, "One.", 0.9, "[Continue to Use Evidence]", p_yes=0.1),
        second: judged(TOKENIZER, "Two.", 0.9, "[No Retrieval]", p_yes=0.1),
        f"{second} [Relevant] Two. [Retrieval] <paragraph> red </paragraph>": judged(TOKENIZER, "Three.", 0.9),
    }
    rag = replace(system(LONG.model_copy(update={"mode": "always", "passages": 1}), script), retriever=None)
    assert tell(rag, Query("q", "Tell", passages=(RED,))).answer == "One. Two. Three."


def test_constraints_drop_high_scoring_contradicted_segments() -> None:
    script = {
        QUESTION: DECIDES,
        FIRST_RED: judged(TOKENIZER, "Red.", 0.9, support="[No support / Contradictory]"),
        FIRST_BLUE: judged(TOKENIZER, "Blue.", 0.1, word_p=0.5),
    }
    assert tell(system(script=script)).answer == "Red."
    assert tell(system(LONG.model_copy(update={"constraint": "no_contradiction"}), script)).answer == "Blue."
    abstains = tell(system(LONG.model_copy(update={"constraint": "full_support"}), script))
    assert (abstains.answer, abstains.segments, abstains.retrieved) == ("", (), False)


def test_siblings_with_equal_text_are_merged() -> None:
    script = {
        QUESTION: DECIDES,
        FIRST_RED: judged(TOKENIZER, "Same.", 0.9, "[No Retrieval]", p_yes=0.1),
        FIRST_BLUE: judged(TOKENIZER, "Same.", 0.6, "[No Retrieval]", p_yes=0.1),
        f"{FIRST_RED} [Relevant] Same. [No Retrieval]": generation(TOKENIZER, ["End.", "</s>"]),
    }
    rag = system(script=script)
    assert tell(rag).answer == "Same. End."
    assert len(rag.generator.prompts) == 4  # type: ignore[attr-defined]


def test_candidates_hold_the_whole_tree() -> None:
    answer = tell(system(LONG.model_copy(update={"keep_candidates": True})))
    texts = [(c.segment.text, c.parent, c.boundary is None) for c in answer.candidates]
    assert texts == [
        ("Red is warm.", None, False),
        ("Blue is cold.", None, False),
        ("Unlike blue.", 0, False),
        ("Very warm.", 0, True),
        ("Very cold.", 1, True),
        ("Mostly.", 2, True),
    ]
    assert answer.candidates[1].boundary is not None
    assert answer.candidates[1].boundary.keep


def test_exploration_keeps_both_branches_without_changing_the_answer() -> None:
    script = {**SCRIPT, f"{QUESTION} [No Retrieval]": generation(TOKENIZER, ["Guess.", "</s>"])}
    config = LONG.model_copy(update={"keep_candidates": True, "explore": True})
    answer = tell(system(config, script))
    assert answer.answer == "Red is warm. Very warm."
    assert "Guess." in [c.segment.text for c in answer.candidates]
    refusing = DecodingConfig(threshold=0.95, passages=2, keep_candidates=True, explore=True)
    answer = tell(system(refusing, script))
    assert (answer.answer, answer.retrieved) == ("Guess.", False)
    assert len(answer.candidates) == 3


def test_oldest_passage_is_truncated_first_and_counted() -> None:
    long = [Passage(name, "", " ".join(f"{name}{n}" for n in range(20))) for name in ("old", "new")]
    first = f"{QUESTION} [Retrieval] <paragraph> {long[0].text} </paragraph>"
    # 60 tokens less 10 for the answer, 5 of the prompt, 2 · 3 marks and 2 of the first segment: 37 are left for 40.
    kept = " ".join(long[0].text.split()[:17])
    second = f"{QUESTION} [Retrieval] <paragraph> {kept} </paragraph> [Relevant] One."
    script = {
        QUESTION: DECIDES,
        first: judged(TOKENIZER, "One.", 0.9, "[Retrieval]", p_yes=0.9),
        f"{second} [Retrieval] <paragraph> {long[1].text} </paragraph>": judged(TOKENIZER, "Two.", 0.9),
    }
    rag = system(LONG.model_copy(update={"passages": 1, "max_tokens": 10}), script)
    rag = replace(rag, retriever=Finds({"Tell": long[:1], "Tell One.": long[1:]}, []))
    rag.generator.max_model_len = 60  # type: ignore[misc]
    answer = tell(rag)
    assert answer.answer == "One. Two."
    assert answer.usage.truncated_tokens == 3


def test_path_ends_when_the_context_is_full() -> None:
    script = {
        QUESTION: DECIDES,
        FIRST_RED: judged(TOKENIZER, "a b c d e f g h", 0.9, "[Retrieval]", p_yes=0.9),
    }
    rag = system(LONG.model_copy(update={"passages": 1, "max_tokens": 10}), script)
    rag.generator.max_model_len = 28  # type: ignore[misc]
    assert tell(rag).answer == "a b c d e f g h"


@pytest.mark.parametrize("seed", range(3))
def test_concurrent_rows_do_not_change_answers(seed: int) -> None:
    """64 rows together, each request ending when it likes, against each row alone."""
    config = DecodingConfig(segments=4, passages=3, keep_candidates=True)
    rag = SelfRag(
        DrawingGenerator(TOKENIZER, random.Random(seed)), ReflectionCritic(TOKENIZER), Tasks(config), DrawingRetriever()
    )
    queries = [Query(str(n), f"Tell {n}") for n in range(64)]

    async def all_at_once() -> list[Answer]:
        return list(await asyncio.gather(*map(rag.answer, queries)))

    def plain(answer: Answer) -> Answer:
        times: dict[str, Any] = {field.name: 0.0 for field in fields(answer.usage) if field.name.endswith("seconds")}
        return replace(answer, usage=replace(answer.usage, **times))

    alone = [plain(asyncio.run(rag.answer(query))) for query in queries]
    assert [plain(answer) for answer in asyncio.run(all_at_once())] == alone
    assert len({len(answer.segments) for answer in alone}) > 1
