"""Builds training trees in the Self-RAG format from the training data."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from pipeline.decoding.prompts import PromptTokenizer
from pipeline.decoding.reflection import IsRel, IsSup, IsUse, Retrieve
from pipeline.training.data import Claim, Instruction, Pair, ReadingTriple
from pipeline.training.trees import Branch, make_given, make_taught

CLAIM_INSTRUCTION = "Is the following claim supported by evidence? Answer with one of: {choices}."


@dataclass(frozen=True)
class LossWeights:
    """Loss weights of tokens by their role.

    Attributes:
        decide: weight of the first retrieval token.
        relevance: weight of IsRel; high, since it is one token among a dozen.
        critique: weight of IsSup, IsUse and later retrieval tokens.
        text: weight of answers and of the end token.
        guess: weight of the text after ``[Irrelevant]``: words that look like an answer. It is trained so that the
            model does not stop writing there, but with a low weight, so that it does not learn wrong answers.
        output: weight of the output of an instruction.
    """

    decide: float = 2.0
    relevance: float = 4.0
    critique: float = 2.0
    text: float = 4.0
    guess: float = 0.2
    output: float = 0.3


@dataclass(frozen=True)
class Negatives:
    """Wrong passages as pairs of title and text.

    Attributes:
        by_question: passages that a retriever ranks high, by question.
        everywhere: all passages.
    """

    by_question: dict[str, list[tuple[str, str]]]
    everywhere: Sequence[tuple[str, str]]

    def draw(
        self, question: str, answer: str, titled: bool, rng: random.Random, hard: float = 0.8
    ) -> tuple[str, str] | None:
        """Draw a passage without the answer: from the question's list with probability ``hard``, else from all.

        Also draws from all passages if no passage of the list fits. The passage has a title if and only if ``titled``,
        since otherwise the title would reveal which passage is wrong. None if 30 draws find no such passage.
        """
        ranked = self.by_question.get(question, []) if rng.random() < hard else []
        fitting = [p for p in ranked if bool(p[0]) == titled and answer.casefold() not in p[1].casefold()]
        if fitting:
            return rng.choice(fitting)
        for _ in range(30):
            title, text = rng.choice(self.everywhere)
            if bool(title) == titled and answer.casefold() not in text.casefold():
                return title, text
        return None


def cut_window(text: str, words: int, rng: random.Random, around: str = "") -> str:
    """Cut a random window of about ``words`` words out of a text; it contains ``around``, if given."""
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


def find_span(text: str, *parts: str) -> str:
    """Find the shortest span of a text with the first occurrence of each part."""
    starts = [text.find(part) for part in parts]
    ends = [start + len(part) for start, part in zip(starts, parts, strict=True)]
    return text[min(starts) : max(ends)]


def draw_wrong_span(passage: str, answer: str, rng: random.Random) -> str:
    """Draw words of the passage that look like the answer but are not it: numbers for numbers, names for names.

    Falls back to a fixed text if eight draws find none.
    """
    words = passage.split()
    length = max(1, len(answer.split()) + rng.choice((-1, 0, 0, 1)))

    def is_alike(word: str) -> bool:
        if any(c.isdigit() for c in answer):
            return any(c.isdigit() for c in word)
        return word[:1].isupper() if answer[:1].isupper() else word.isalpha()

    def is_unlike(span: str) -> bool:
        return answer.casefold() not in span.casefold() and span.casefold() not in answer.casefold()

    starts = [i for i, word in enumerate(words) if is_alike(word)] or list(range(len(words)))
    for _ in range(8):
        start = rng.choice(starts)
        span = " ".join(words[start : start + length]).strip(".,;:()\"'")
        if span and is_unlike(span):
            return span
    return "unknown" if is_unlike("unknown") else "none of it"


@dataclass(frozen=True)
class TreeBuilder:
    """Builds training trees from the rows of the training data."""

    tokenizer: PromptTokenizer
    negatives: Negatives
    weights: LossWeights = LossWeights()
    max_output_tokens: int = 32

    def _build_control(self, weight: float, *tokens: StrEnum) -> Branch:
        return make_taught(self.tokenizer.encode_control(*tokens), weight)

    def _build_question(self, question: str, context: str | None = None) -> Branch:
        prompt = make_given(self.tokenizer.encode_prompt(question, context))
        return prompt + self._build_control(self.weights.decide, Retrieve.YES)

    def _build_passage(self, title: str, text: str) -> Branch:
        return make_given(self.tokenizer.encode_passage(title, text))

    def _build_end(self, use: IsUse) -> Branch:
        return self._build_control(self.weights.critique, use) + make_taught([self.tokenizer.eos], self.weights.text)

    def _build_supported(self, text: str, weight: float) -> Branch:
        return make_taught(self.tokenizer.encode_text(text), weight) + self._build_control(
            self.weights.critique, IsSup.FULLY
        )

    def _build_right(self, answer: str) -> Branch:
        relevant = self._build_control(self.weights.relevance, IsRel.RELEVANT)
        return relevant + self._build_supported(answer, self.weights.text) + self._build_end(IsUse.FIVE)

    def _build_judged(self, text: str, support: IsSup, use: IsUse) -> Branch:
        """Build a given answer, of which only the critique is trained."""
        answer = self._build_control(0.0, IsRel.RELEVANT) + make_given(self.tokenizer.encode_text(text))
        return answer + self._build_control(self.weights.critique, support) + self._build_end(use)

    def _build_irrelevant(self, text: str) -> Branch:
        relevance = self._build_control(self.weights.relevance, IsRel.IRRELEVANT)
        return (
            relevance + make_taught(self.tokenizer.encode_text(text), self.weights.guess) + self._build_end(IsUse.ONE)
        )

    def _build_wrong_passage(self, title: str, text: str, answer: str, rng: random.Random) -> Branch:
        span = draw_wrong_span(text, answer, rng)
        return self._build_passage(title, text).with_children(
            self._build_irrelevant(span), self._build_judged(span, IsSup.NONE, IsUse.ONE)
        )

    def build_reading(self, row: ReadingTriple, words: int, rng: random.Random) -> Branch:
        """Build a question with its gold passage, right and wrong answers to it, and wrong passages.

        A third of the trees have no wrong passage: relevance is learned sooner than reading, and wrong passages cost
        as many tokens as gold ones.
        """
        text = cut_window(row.passage, words, rng, around=row.answer)
        answers = [self._build_right(row.answer)]
        wrong = draw_wrong_span(text, row.answer, rng)
        if rng.random() < 0.8:
            answers.append(self._build_judged(wrong, IsSup.NONE, IsUse.ONE))
        if rng.random() < 0.3:
            both = [row.answer, wrong]
            rng.shuffle(both)
            answers.append(self._build_judged(" and ".join(both), IsSup.PARTIALLY, IsUse.THREE))
        passages = [self._build_passage(row.title, text).with_children(*answers)]
        distractors = rng.choices((0, 1, 2), (0.35, 0.40, 0.25))[0]
        wrong_passages = [self._build_distractor(row, words, rng) for _ in range(distractors)]
        return self._build_question(row.question).with_children(*passages, *filter(None, wrong_passages))

    def _build_distractor(self, row: ReadingTriple, words: int, rng: random.Random) -> Branch | None:
        """Build a passage without the answer: the longest part of the gold one without it, or a drawn one.

        None if there is no such passage.
        """
        rest = max(row.passage.split(row.answer), key=len)
        clean = row.answer.casefold() not in rest.casefold()
        if clean and len(rest.split()) >= 35 and rng.random() < 0.25:
            return self._build_wrong_passage(row.title, cut_window(rest.strip(), words, rng), row.answer, rng)
        drawn = self.negatives.draw(row.question, row.answer, bool(row.title), rng)
        if drawn is None:
            return None
        title, text = drawn
        return self._build_wrong_passage(title, cut_window(text, words, rng), row.answer, rng)

    def build_pair(self, row: Pair, rng: random.Random) -> Branch:
        """Build a question with a sentence that answers it and two that do not; trains only the decision and IsRel."""
        right = self._build_passage("", row.sentence) + self._build_control(self.weights.relevance, IsRel.RELEVANT)
        drawn = [self.negatives.draw(row.question, row.sentence, False, rng) for _ in range(2)]
        irrelevant = self._build_control(self.weights.relevance, IsRel.IRRELEVANT)
        wrong = [self._build_passage(title, text) + irrelevant for title, text in filter(None, drawn)]
        return self._build_question(row.question).with_children(right, *wrong)

    def build_instruction(self, row: Instruction) -> Branch:
        """Build an instruction that needs no retrieval, with at most ``max_output_tokens`` of its output."""
        prompt = make_given(self.tokenizer.encode_prompt(row.instruction))
        start = prompt + self._build_control(self.weights.decide, Retrieve.NO)
        output = self.tokenizer.encode_text(row.output)
        if len(output) > self.max_output_tokens:
            return start + make_taught(output[: self.max_output_tokens], self.weights.output)
        return start + make_taught(output, self.weights.output) + self._build_end(IsUse.FIVE)

    def build_two_segments(self, first: ReadingTriple, second: ReadingTriple, words: int, rng: random.Random) -> Branch:
        """Build two questions in one prompt; the second answer continues with the passage, or retrieves another.

        It continues if both questions are about the same passage, and both answers fit in a window of it.
        """
        start = self._build_question(f"{first.question} {second.question}")
        relevant = self._build_control(self.weights.relevance, IsRel.RELEVANT)
        answers = [self._build_supported(row.answer, self.weights.text) for row in (first, second)]
        around = first.answer
        if first.passage == second.passage:
            around = find_span(first.passage, first.answer, second.answer)
        shared = first.passage == second.passage and len(around.split()) <= words
        text = cut_window(first.passage, words, rng, around=around if shared else first.answer)
        head = start + self._build_passage(first.title, text) + relevant + answers[0]
        boundary = self._build_control(self.weights.critique, Retrieve.CONTINUE if shared else Retrieve.YES)
        if not shared:
            other = cut_window(second.passage, words, rng, around=second.answer)
            boundary = boundary + self._build_passage(second.title, other) + relevant
        return head + boundary + answers[1] + self._build_end(IsUse.FIVE)

    def build_claim(self, row: Claim, other: Claim, rng: random.Random) -> Branch:
        """Build a claim with a closed set of answers.

        Its passages are its own evidence, followed by the right and a wrong label, and the evidence of another claim as
        a wrong passage, unless both have the same title or text.
        """
        instruction = CLAIM_INSTRUCTION.format(choices=", ".join(row.choices))
        start = self._build_question(instruction, row.claim)
        wrong = [choice for choice in row.choices if choice != row.label][:1]
        judged = [self._build_judged(choice, IsSup.NONE, IsUse.ONE) for choice in wrong]
        evidence = self._build_passage(row.title, row.text).with_children(self._build_right(row.label), *judged)
        if other.title == row.title or other.text == row.text:
            return start.with_children(evidence)
        distractor = self._build_passage(other.title, other.text) + self._build_irrelevant(rng.choice(row.choices))
        return start.with_children(evidence, distractor)
