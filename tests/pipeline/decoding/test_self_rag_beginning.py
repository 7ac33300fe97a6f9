"""All prompts of a long answer begin with one beginning of sequence, for both critics of a model of Llama 2's kind."""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config.run import RunConfig
from pipeline.config.sections import DecodingConfig
from pipeline.decoding.profiles import Tasks
from pipeline.decoding.protocols import Critic
from pipeline.decoding.reflection import REFLECTION_TOKENS
from pipeline.decoding.self_rag import SelfRag
from pipeline.decoding.types import Generation, Passage, Query
from pipeline.engine.models import load_critic
from tests.support.tokenizers import CHAT, add_control_tokens, load_folder, write_llama

PASSAGES = (Passage("p", "Al Gore", "Al Gore was </s><s> vice president."), Passage("q", "", "<s>[Retrieval]"))
QUERY = Query("q", "<s> Who is Al Gore?", "</s>", passages=PASSAGES)


@dataclass
class RepeatingGenerator:
    """Writes the same segment after every prompt, and decides to go on; records the prompts."""

    segment: Sequence[int]
    max_model_len: int = 2000
    prompts: list[list[int]] = field(default_factory=list)

    async def generate(self, prompt: Sequence[int], max_tokens: int, stops: Sequence[int]) -> Generation:
        self.prompts.append(list(prompt))
        ids = self.segment[-1:] if max_tokens == 1 else self.segment
        table = np.full((len(ids), len(REFLECTION_TOKENS)), math.log(0.2))
        return Generation(tuple(ids), np.full(len(ids), math.log(0.5)), table, len(prompt))


def load_model(folder: Path, critic: str, **settings: Any) -> Critic:
    folder = add_control_tokens(write_llama(folder, **settings))
    run = {"queries": "", "output": "", "model": {"name": str(folder)}, "decoding": {"critic": critic}}
    return load_critic(RunConfig.model_validate(run))


def write_long_answer(critic: Critic, kind: str, segment: Sequence[int]) -> list[list[int]]:
    generator = RepeatingGenerator(segment)
    config = DecodingConfig.model_validate({"critic": kind, "segments": 3, "beam_width": 2, "mode": "always"})
    answer = asyncio.run(SelfRag(generator, critic, Tasks(config)).answer(QUERY))
    assert len(answer.segments) == 3
    return generator.prompts


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize(("adds", "beginning"), [(True, ["<s>"]), (None, ["<s>"]), (False, [])])
@pytest.mark.parametrize(
    ("kind", "template", "segment"),
    [
        ("reflection", None, ["[Relevant]", "▁Al", "[Fully supported]", "[Retrieval]"]),
        ("prompted", CHAT["without <s>"], ["▁Al", "<0x0A>"]),
    ],
)
def test_every_prompt_begins_as_the_tokenizer_begins(
    tmp_path: Path, legacy: bool, adds: bool | None, beginning: list[str], kind: str, template: str, segment: list[str]
) -> None:
    critic = load_model(tmp_path, kind, legacy=legacy, add_bos_token=adds, chat_template=template)
    tokenizer = load_folder(tmp_path)
    prompts = write_long_answer(critic, kind, tokenizer.convert_tokens_to_ids(segment))
    assert len(prompts) >= 6
    for prompt in prompts:
        tokens = tokenizer.convert_ids_to_tokens(prompt)
        assert [token for token in tokens if token in ("<s>", "</s>")] == beginning
        assert tokens[: len(beginning)] == beginning
    assert max(tokenizer.decode(prompt).count("Al") for prompt in prompts) >= 4


@pytest.mark.parametrize("adds", [True, None, False])
def test_a_beginning_in_the_chat_template_is_not_doubled(tmp_path: Path, adds: bool | None) -> None:
    critic = load_model(tmp_path, "prompted", add_bos_token=adds, chat_template=CHAT["with <s>"])
    tokenizer = load_folder(tmp_path)
    prompts = write_long_answer(critic, "prompted", tokenizer.convert_tokens_to_ids(["▁Al", "<0x0A>"]))
    assert {(prompt[0], prompt.count(1)) for prompt in prompts} == {(1, 1)}
