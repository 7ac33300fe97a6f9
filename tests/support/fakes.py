"""Hand-written stand-ins for the engine, the tokenizer and the retriever: for unit tests of pure logic only."""

import asyncio
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from pipeline.decoding.prompts import PromptTokenizer
from pipeline.decoding.reflection import CONTROL_TOKENS, REFLECTION_TOKENS, IsSup, ReflectionIds, Retrieve
from pipeline.decoding.types import Generation, Passage, Retrieved, RetrievedPassage

EOS = 1
FIRST_CONTROL = 2
FIRST_WORD = 100


class WordTokenizer:
    """One id for each word; control tokens have ids of their own that text never yields."""

    eos_token_id = EOS

    def __init__(self) -> None:
        self.vocabulary = {token: FIRST_CONTROL + n for n, token in enumerate(CONTROL_TOKENS)}
        self.words: list[str] = []

    def get_vocab(self) -> dict[str, int]:
        return self.vocabulary

    def word(self, text: str) -> int:
        if text not in self.words:
            self.words.append(text)
        return FIRST_WORD + self.words.index(text)

    def __call__(self, text: str, split_special_tokens: bool, add_special_tokens: bool = True) -> dict[str, list[int]]:
        assert split_special_tokens, "untrusted text must never become control tokens"
        return {"input_ids": [self.word(word) for word in text.split()]}

    def decode(self, ids: Sequence[int], **_: bool) -> str:
        names = {number: token for token, number in self.vocabulary.items()} | {EOS: "</s>"}
        return " ".join(names.get(i) or self.words[i - FIRST_WORD] for i in ids)


def word_tokenizer() -> PromptTokenizer:
    tokenizer = WordTokenizer()
    return PromptTokenizer(tokenizer, ReflectionIds.of(tokenizer, "words"))


def generation(
    tokenizer: PromptTokenizer,
    written: Sequence[str | tuple[str, float]],
    reflection: dict[int, dict[str, float]] | None = None,
    prompt_tokens: int = 0,
) -> Generation:
    """What an engine would return: tokens with their probabilities, and reflection probabilities by position."""
    words = [w if isinstance(w, tuple) else (w, 1.0) for w in written]
    ids = [tokenizer.reflection.ids.get(w) or (EOS if w == "</s>" else tokenizer.tokenizer.word(w)) for w, _ in words]
    table = np.full((len(ids), len(REFLECTION_TOKENS)), math.log(1e-9))
    for position, probabilities in (reflection or {}).items():
        for token, probability in probabilities.items():
            table[position, REFLECTION_TOKENS.index(token)] = math.log(probability)
    return Generation(tuple(ids), np.log([p for _, p in words]), table, prompt_tokens)


def judged(
    tokenizer: PromptTokenizer,
    words: str,
    relevant: float,
    end: str = "</s>",
    p_yes: float = 0.5,
    support: str | None = None,
    word_p: float = 1.0,
) -> Generation:
    """``[Relevant] words [support] end``: its score is word_p + relevant (+ 1, 0.5 or 0 for the support)."""
    tokens: list[str | tuple[str, float]] = ["[Relevant]", *((word, word_p) for word in words.split())]
    reflection = {0: {"[Relevant]": relevant, "[Irrelevant]": 1 - relevant + 1e-12}}
    if support:
        reflection[len(tokens)] = {support: 1.0}
        tokens.append(support)
    reflection[len(tokens)] = {"[Retrieval]": p_yes, "[No Retrieval]": 1 - p_yes}
    return generation(tokenizer, [*tokens, end], reflection, prompt_tokens=10)


@dataclass
class DrawingGenerator:
    """A model whose every word follows from its prompt, and that ends its requests in any order.

    Attributes:
        words: what it may write, so that texts repeat or name a choice.
    """

    tokenizer: PromptTokenizer
    rng: random.Random
    words: Sequence[str] = tuple(f"w{n}" for n in range(9))
    max_model_len: int = 1000

    async def generate(self, prompt: Sequence[int], max_tokens: int, stops: Sequence[int]) -> Generation:
        for _ in range(self.rng.randrange(6)):
            await asyncio.sleep(0)
        draw = random.Random(self.tokenizer.decode(list(prompt)))
        if max_tokens == 1:
            p = draw.random()
            return generation(self.tokenizer, ["[Retrieval]"], {0: {"[Retrieval]": p, "[No Retrieval]": 1 - p}})
        end = draw.choice(["</s>", *map(str, Retrieve)])
        support = draw.choice([None, *map(str, IsSup)])
        word = draw.choice(self.words)
        return judged(self.tokenizer, word, draw.random(), end, draw.random(), support, 0.1 + 0.9 * draw.random())


@dataclass
class DrawingRetriever:
    """Passages that follow from what is asked."""

    async def retrieve(self, query: str, k: int, condition: str | None = None) -> Retrieved:
        drawn = random.Random(query).sample(range(30), k)
        return Retrieved(
            [RetrievedPassage(Passage(f"p{n}", "", f"text{n}"), None, rank) for rank, n in enumerate(drawn, 1)]
        )


@dataclass
class ScriptedGenerator:
    """Answers prompts by a function of their text, and records them."""

    tokenizer: PromptTokenizer
    script: Callable[[str], Generation]
    max_model_len: int = 1000
    prompts: list[str] = field(default_factory=list)

    async def generate(self, prompt: Sequence[int], max_tokens: int, stops: Sequence[int]) -> Generation:
        text = self.tokenizer.decode(list(prompt))
        self.prompts.append(text)
        return self.script(text)


@dataclass
class ListRetriever:
    """Always the same passages; records the queries and conditions."""

    passages: Sequence[Passage]
    queries: list[str] = field(default_factory=list)
    conditions: list[str | None] = field(default_factory=list)

    async def retrieve(self, query: str, k: int, condition: str | None = None) -> Retrieved:
        self.queries.append(query)
        self.conditions.append(condition)
        return Retrieved([RetrievedPassage(p, 1.0 / n, n) for n, p in enumerate(self.passages[:k], 1)])
