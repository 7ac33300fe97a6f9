"""Teaching data → training trees in the Self-RAG format."""

import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from pipeline.decoding.prompts import PromptTokenizer
from pipeline.decoding.reflection import IsRel, IsSup, IsUse, Retrieve
from pipeline.training.data import Claim, Instruction, Pair, ReadingTriple, TeachingData
from pipeline.training.trees import Branch, given, taught

CLAIM_INSTRUCTION = "Is the following claim supported by evidence? Answer with one of: {choices}."

# Shares of the kinds of trees: reading first, since spans are the hardest to learn.
READING, PAIR, INSTRUCTION, TWO_SEGMENTS, CLAIM = 0.62, 0.06, 0.16, 0.08, 0.08


@dataclass(frozen=True)
class LossWeights:
    """Loss weight of a token by what it is. Relevance is one token among a dozen, hence its weight.

    A guess is what follows ``[Irrelevant]``: words that look like an answer, so that the model does not fall
    silent there, and lightly weighted, so that it does not learn to be wrong.
    """

    decide: float = 2.0
    relevance: float = 4.0
    critique: float = 2.0
    text: float = 4.0
    guess: float = 0.2
    output: float = 0.3


@dataclass(frozen=True)
class Negatives:
    """Passages (title, text) that a retriever ranks high for a question, by question, and all passages."""

    by_question: dict[str, list[tuple[str, str]]]
    everywhere: Sequence[tuple[str, str]]

    def draw(self, question: str, answer: str, titled: bool, rng: random.Random, hard: float = 0.8) -> tuple[str, str]:
        """One passage without the answer: with probability ``hard`` from the question's own list, otherwise any.

        It has a title just when ``titled``, or a missing title would give a wrong passage away.
        """
        ranked = self.by_question.get(question, []) if rng.random() < hard else []
        fitting = [p for p in ranked if bool(p[0]) == titled and answer.casefold() not in p[1].casefold()]
        if fitting:
            return rng.choice(fitting)
        for _ in range(30):
            title, text = rng.choice(self.everywhere)
            if bool(title) == titled and answer.casefold() not in text.casefold():
                return title, text
        return rng.choice(self.everywhere)


def window(text: str, words: int, rng: random.Random, around: str = "") -> str:
    """A run of about ``words`` words of the text that holds ``around``, at a random place in it."""
    spans = [match.span() for match in re.finditer(r"\S+", text)]
    if len(spans) <= words:
        return text
    place = text.find(around) if around else rng.randrange(len(text))
    end = place + len(around)
    first = max(0, sum(1 for _, stop in spans if stop <= place))
    last = max(first, sum(1 for start, _ in spans if start < end) - 1)
    slack = max(0, words - (last - first + 1))
    low, high = max(0, first - slack), min(first, len(spans) - words)
    begin = rng.randint(min(low, high), max(low, high)) if high >= low else low
    stop = min(len(spans), max(begin + words, last + 1))
    return text[spans[begin][0] : spans[stop - 1][1]]


def wrong_span(passage: str, answer: str, rng: random.Random) -> str:
    """Words of the passage that look like the answer (numbers for numbers, names for names) and are not it."""
    words = passage.split()
    length = max(1, len(answer.split()) + rng.choice((-1, 0, 0, 1)))

    def alike(word: str) -> bool:
        if any(c.isdigit() for c in answer):
            return any(c.isdigit() for c in word)
        return word[:1].isupper() if answer[:1].isupper() else word.isalpha()

    def unlike(span: str) -> bool:
        return answer.casefold() not in span.casefold() and span.casefold() not in answer.casefold()

    starts = [i for i, word in enumerate(words) if alike(word)] or list(range(len(words)))
    for _ in range(8):
        start = rng.choice(starts)
        span = " ".join(words[start : start + length]).strip(".,;:()\"'")
        if span and unlike(span):
            return span
    return "unknown" if unlike("unknown") else "none of it"


@dataclass(frozen=True)
class TreeBuilder:
    """Builds training trees from teaching data."""

    tokenizer: PromptTokenizer
    negatives: Negatives
    weights: LossWeights = LossWeights()
    max_output_tokens: int = 32

    def _control(self, weight: float, *tokens: StrEnum) -> Branch:
        return taught(self.tokenizer.control(*tokens), weight)

    def _question(self, question: str, context: str | None = None) -> Branch:
        prompt = given(self.tokenizer.prompt(question, context))
        return prompt + self._control(self.weights.decide, Retrieve.YES)

    def _passage(self, title: str, text: str) -> Branch:
        return given(self.tokenizer.passage(title, text))

    def _end(self, use: IsUse) -> Branch:
        return self._control(self.weights.critique, use) + taught([self.tokenizer.eos], self.weights.text)

    def _supported(self, text: str, weight: float) -> Branch:
        return taught(self.tokenizer.text(text), weight) + self._control(self.weights.critique, IsSup.FULLY)

    def _right(self, answer: str) -> Branch:
        relevant = self._control(self.weights.relevance, IsRel.RELEVANT)
        return relevant + self._supported(answer, self.weights.text) + self._end(IsUse.FIVE)

    def _judged(self, text: str, support: IsSup, use: IsUse) -> Branch:
        """An answer that the model did not choose to give: only its critique is taught."""
        answer = self._control(0.0, IsRel.RELEVANT) + given(self.tokenizer.text(text))
        return answer + self._control(self.weights.critique, support) + self._end(use)

    def _irrelevant(self, text: str) -> Branch:
        relevance = self._control(self.weights.relevance, IsRel.IRRELEVANT)
        return relevance + taught(self.tokenizer.text(text), self.weights.guess) + self._end(IsUse.ONE)

    def _wrong_passage(self, title: str, text: str, answer: str, rng: random.Random) -> Branch:
        span = wrong_span(text, answer, rng)
        return self._passage(title, text).then(self._irrelevant(span), self._judged(span, IsSup.NONE, IsUse.ONE))

    def reading(self, row: ReadingTriple, words: int, rng: random.Random) -> Branch:
        """A question with its gold passage, right and wrong answers to it, and wrong passages.

        Nearly half have no wrong passage: relevance is soon learned, reading is not, and costs the same tokens.
        """
        text = window(row.passage, words, rng, around=row.answer)
        answers = [self._right(row.answer)]
        wrong = wrong_span(text, row.answer, rng)
        if rng.random() < 0.8:
            answers.append(self._judged(wrong, IsSup.NONE, IsUse.ONE))
        if rng.random() < 0.3:
            both = [row.answer, wrong]
            rng.shuffle(both)
            answers.append(self._judged(" and ".join(both), IsSup.PARTIALLY, IsUse.THREE))
        passages = [self._passage(row.title, text).then(*answers)]
        distractors = rng.choices((0, 1, 2), (0.45, 0.40, 0.15))[0]
        passages += [self._distractor(row, words, rng) for _ in range(distractors)]
        return self._question(row.question).then(*passages)

    def _distractor(self, row: ReadingTriple, words: int, rng: random.Random) -> Branch:
        """A passage without the answer: the rest of the gold passage, or a retriever's choice."""
        rest = max(row.passage.split(row.answer), key=len)
        clean = row.answer.casefold() not in rest.casefold()
        if clean and len(rest.split()) >= 35 and rng.random() < 0.25:
            return self._wrong_passage(row.title, window(rest.strip(), words, rng), row.answer, rng)
        title, text = self.negatives.draw(row.question, row.answer, bool(row.title), rng)
        return self._wrong_passage(title, window(text, words, rng), row.answer, rng)

    def pair(self, row: Pair, rng: random.Random) -> Branch:
        """A question with the sentence that answers it and sentences that do not: relevance only."""
        right = self._passage("", row.sentence) + self._control(self.weights.relevance, IsRel.RELEVANT)
        wrong = [
            self._passage("", self.negatives.draw(row.question, row.sentence, False, rng)[1])
            + self._control(self.weights.relevance, IsRel.IRRELEVANT)
            for _ in range(2)
        ]
        return self._question(row.question).then(right, *wrong)

    def instruction(self, row: Instruction) -> Branch:
        """A task that needs no retrieval, with the beginning of its output."""
        prompt = given(self.tokenizer.prompt(row.instruction))
        start = prompt + self._control(self.weights.decide, Retrieve.NO)
        output = self.tokenizer.text(row.output)
        if len(output) > self.max_output_tokens:
            return start + taught(output[: self.max_output_tokens], self.weights.output)
        return start + taught(output, self.weights.output) + self._end(IsUse.FIVE)

    def two_segments(self, first: ReadingTriple, second: ReadingTriple, words: int, rng: random.Random) -> Branch:
        """Two questions at once: the second answer continues with the same passage, or retrieves its own."""
        start = self._question(f"{first.question} {second.question}")
        relevant = self._control(self.weights.relevance, IsRel.RELEVANT)
        answers = [self._supported(row.answer, self.weights.text) for row in (first, second)]
        shared = first.passage == second.passage
        text = first.passage if shared else window(first.passage, words, rng, around=first.answer)
        head = start + self._passage(first.title, text) + relevant + answers[0]
        boundary = self._control(self.weights.critique, Retrieve.CONTINUE if shared else Retrieve.YES)
        if not shared:
            other = window(second.passage, words, rng, around=second.answer)
            boundary = boundary + self._passage(second.title, other) + relevant
        return head + boundary + answers[1] + self._end(IsUse.FIVE)

    def claim(self, row: Claim, other: Claim, rng: random.Random) -> Branch:
        """A closed set: a claim, its evidence with the label, and another claim's evidence."""
        instruction = CLAIM_INSTRUCTION.format(choices=", ".join(row.choices))
        start = self._question(instruction, row.claim)
        wrong = [choice for choice in row.choices if choice != row.label][:1]
        judged = [self._judged(choice, IsSup.NONE, IsUse.ONE) for choice in wrong]
        evidence = self._passage(row.title, row.text).then(self._right(row.label), *judged)
        if other.title == row.title or other.text == row.text:
            return start.then(evidence)
        return start.then(evidence, self._passage(other.title, other.text) + self._irrelevant(rng.choice(row.choices)))

    def stream(self, data: TeachingData, rng: random.Random, longest: Callable[[], int]) -> Iterator[Branch]:
        """Endless trees of all kinds; passages are cut to windows of 40 to ``longest()`` words at most."""
        by_passage = defaultdict(list)
        for reading in data.readings:
            by_passage[reading.passage].append(reading)
        tasks = defaultdict(list)
        for instruction in data.instructions:
            tasks[instruction.source].append(instruction)
        sources = list(tasks.values())
        kinds: tuple[float, ...] = (READING, PAIR * bool(data.pairs), INSTRUCTION * bool(data.instructions))
        kinds += (TWO_SEGMENTS, CLAIM * bool(data.claims))
        while True:
            words = rng.randint(40, longest())
            kind = rng.choices(range(5), kinds)[0]
            row = rng.choice(data.readings)
            if kind == 0:
                yield self.reading(row, words, rng)
            elif kind == 1:
                yield self.pair(rng.choice(data.pairs), rng)
            elif kind == 2:
                yield self.instruction(rng.choice(rng.choice(sources)))
            elif kind == 3:
                twins = [r for r in by_passage[row.passage] if r.question != row.question]
                other = rng.choice(twins) if twins and rng.random() < 0.5 else rng.choice(data.readings)
                yield self.two_segments(row, other, words, rng)
            else:
                yield self.claim(rng.choice(data.claims), rng.choice(data.claims), rng)
