"""Reader and critic for any instruct model, which is prompted with the four questions of the reflection tokens.

This goes beyond the paper. Each question in ``prompted_reader.yaml`` is answered with one token, the first of a
label. The probabilities of the labels stand in for those of the reflection tokens, so that scores, constraints and the
beam are the same. In the long form a segment is a line; in the short form it is the whole answer.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from itertools import chain, takewhile
from pathlib import Path as File
from typing import Any, TypeVar

import yaml

from pipeline.config.loading import hash_tree
from pipeline.config.sections import DecodingConfig
from pipeline.decoding.beam import gather_all
from pipeline.decoding.chat_turn import PLACE, UserTurn, split_at_place
from pipeline.decoding.critique import (
    IS_REL_VALUES,
    IS_SUP_VALUES,
    IS_USE_VALUES,
    expected_value,
    read_probabilities,
    read_retrieve_probability,
    segment_score,
    sequence_probability,
)
from pipeline.decoding.prompts import drop_unread, format_evidence, format_passage
from pipeline.decoding.protocols import Generator, Reader
from pipeline.decoding.reflection import IsRel, IsSup, IsUse, Retrieve
from pipeline.decoding.reflection_reader import Requests, choose_opening_token
from pipeline.decoding.tokenization import TextTokenizer
from pipeline.decoding.types import (
    Boundary,
    Critique,
    Finish,
    Generation,
    Passage,
    Path,
    Query,
    RetrievedPassage,
    Segment,
    Usage,
)

PROMPTS: Mapping[str, Any] = yaml.safe_load(File(__file__).with_suffix(".yaml").read_text("utf-8"))
# The question of each group of reflection tokens; its labels are in the order of the group's tokens.
QUESTIONS: Mapping[type[StrEnum], str] = {Retrieve: "retrieve", IsRel: "relevant", IsSup: "supported", IsUse: "useful"}
VALUES = {IsRel: IS_REL_VALUES, IsSup: IS_SUP_VALUES, IsUse: IS_USE_VALUES}
Group = TypeVar("Group", bound=StrEnum)


def hash_prompts() -> str:
    """Return a digest of the prompts: a run can only be resumed with the same ones."""
    return hash_tree(PROMPTS)


@dataclass(frozen=True)
class Labels:
    """Ids of the labels of a question, as answers in a chat template.

    Attributes:
        lead: ids that all labels begin with, such as a word start before digits; they stand behind the question.
        firsts: the id of each label that follows them.
    """

    lead: list[int]
    firsts: tuple[int, ...]

    @classmethod
    def of(cls, answers: Iterable[Sequence[int]]) -> "Labels":
        """Split the ids of the labels at the first place at which they differ."""
        places = list(zip(*answers, strict=False))
        lead = list(takewhile(lambda ids: len(set(ids)) == 1, places[:-1]))
        return cls([ids[0] for ids in lead], places[len(lead)])


@dataclass(frozen=True)
class PromptedCritic:
    """An instruct model, prompted in its own chat template.

    Attributes:
        tokenizer: Hugging Face tokenizer of the model.
        name: name of the model, for error messages.

    Raises:
        ValueError: there is no chat template, it does not render the text of a turn unchanged, or two labels of a
            question begin with the same token.
    """

    tokenizer: Any
    name: str

    def __post_init__(self) -> None:
        if not self.tokenizer.chat_template:
            raise ValueError(f"model {self.name}: no chat template, which decoding.critic=prompted requires")
        for question in QUESTIONS.values():
            firsts = self.labels[question].firsts
            if len(set(firsts)) < len(firsts):
                raise ValueError(
                    f"model {self.name}: two labels of the question {question!r} start with the same token"
                )

    def reader(self, generator: Generator, config: DecodingConfig, query: Query) -> Reader:
        """See :meth:`Critic.reader`."""
        return PromptedReader(self, Requests(generator), config, query)

    @cached_property
    def watched(self) -> tuple[int, ...]:
        """First ids of the labels, in the order of the 13 reflection tokens.

        ``[Continue to Use Evidence]`` has no label; its place repeats that of ``[No Retrieval]`` and is never read.
        """
        decide, *judge = (self.labels[question].firsts for question in QUESTIONS.values())
        return (*decide, decide[-1], *chain.from_iterable(judge))

    @cached_property
    def labels(self) -> Mapping[str, "Labels"]:
        """Ids of the labels of each question."""
        questions = {name: entry["labels"] for name, entry in PROMPTS.items() if isinstance(entry, Mapping)}
        return {name: Labels.of(map(self.turn.encode_answer, labels)) for name, labels in questions.items()}

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Ids that end an answer: the end of sequence, and any special token behind an answer in the chat template."""
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": PLACE}]
        _, after = split_at_place(self.tokenizer.apply_chat_template(turns, tokenize=False), self.name)
        special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.get_added_vocab().values())
        behind = [token for token in self.text.encode_trusted(after)[:1] if token in special]
        return tuple(dict.fromkeys([int(self.tokenizer.eos_token_id), *behind]))

    @cached_property
    def newlines(self) -> frozenset[int]:
        """Ids of the tokens that contain a line break, in vocabularies that are byte-level or have byte fallback."""
        return frozenset(i for text, i in self.tokenizer.get_vocab().items() if "Ċ" in text or text == "<0x0A>")

    @cached_property
    def text(self) -> TextTokenizer:
        """The tokenizer for text."""
        return TextTokenizer(self.tokenizer)

    @cached_property
    def turn(self) -> UserTurn:
        """The chat template around a user's text."""
        return UserTurn.render(self.text, self.name)

    def encode_text(self, text: str) -> list[int]:
        """Encode untrusted text: control tokens in it stay plain characters."""
        return self.text.encode_middle(text)

    def compare_pieces(self, query: Query, passage: Passage) -> str | None:
        """See :meth:`Critic.compare_pieces`."""
        values = {"query": format_query(query), "passage": format_passage(passage.title, passage.text)}
        return self.turn.compare_pieces(fill_template(PROMPTS["write_from_passage"], values))

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


@dataclass
class PromptedReader:
    """A reader of one query that prompts an instruct model.

    Attributes:
        lost: passage tokens cut so far, summed over all prompts.
    """

    critic: PromptedCritic
    requests: Requests
    config: DecodingConfig
    query: Query
    lost: int = field(default=0)

    @property
    def usage(self) -> Usage:
        """See :attr:`Reader.usage`."""
        return replace(self.requests.usage, truncated_tokens=self.lost)

    @property
    def room(self) -> int:
        """Maximum number of tokens of a prompt."""
        return self.requests.generator.max_model_len - self.config.max_tokens

    async def decide(self) -> Boundary:
        """See :meth:`Reader.decide`."""
        fixed = max(len(self._build_question(question)) for question in QUESTIONS.values())
        if fixed > self.room:
            raise ValueError(f"the query needs {fixed} tokens, but the model accepts {self.room}; shorten it")
        return await self._ask_boundary("") if self.config.mode == "adaptive" else Boundary()

    async def _ask_boundary(self, answer: str) -> Boundary:
        if self.config.mode != "adaptive":
            return Boundary()
        asked = await self._ask("retrieve_again" if answer else "retrieve", answer=answer)
        return Boundary(read_retrieve_probability(asked))

    def has_room(self, path: Path) -> bool:
        """See :meth:`Reader.has_room`."""
        written = sum(len(segment.token_ids) for segment in path.segments)
        return len(self._build_question("retrieve_again")) + written <= self.room

    async def write(self, path: Path, opening: Retrieve, evidence: RetrievedPassage | None) -> Path:
        """See :meth:`Reader.write`: generates a segment, then prompts for critique and next decision concurrently."""
        written = [token for segment in path.segments for token in segment.token_ids]
        template = PROMPTS["write_from_passage" if evidence else "write"]
        prompt, lost = self._encode_prompt(template, evidence, written=len(written))
        self.lost += lost
        if lost and evidence:
            kept = len(self.critic.encode_text(format_evidence(evidence))) - lost
            evidence = drop_unread(evidence, kept, self.critic.encode_text)
        generation = await self.requests.ask(prompt + written, self.config.max_tokens, self._stops)
        ids, finish = self._split(generation)
        text = self.critic.decode(ids).strip()
        answer = self.critic.decode([*written, *ids]).strip()
        questions = (self._judge(generation, text, evidence), self._decide_next(path, answer, finish))
        done: list[Any] = await gather_all(*questions)
        judged, boundary = done
        parts = (choose_opening_token(opening, evidence), judged.relevance, text, judged.support, judged.utility)
        raw = "".join(part for part in parts if part)
        segment = Segment(text, raw, evidence, judged, opening, tuple(ids))
        return Path((*path.segments, segment), boundary, finish)

    async def _decide_next(self, path: Path, answer: str, finish: Finish | None) -> Boundary | None:
        """Return the boundary after a new segment of the path; None if the segment ends the answer."""
        if finish is not None:
            return None
        if len(path.segments) + 1 == self.config.segments:
            return Boundary()
        return await self._ask_boundary(answer)

    @property
    def _stops(self) -> list[int]:
        lines = self.critic.newlines if self.config.segments > 1 else ()
        return [*self.critic.ends, *lines]

    def _split(self, generation: Generation) -> tuple[list[int], Finish | None]:
        """Return the ids of the segment, and its finish reason: None if it ended at a line break."""
        ids = list(generation.token_ids)
        if ids[-1] in self.critic.ends:
            return ids[:-1], Finish.STOP
        if ids[-1] in self.critic.newlines and self.config.segments > 1:
            return ids, None
        return ids, Finish.LENGTH

    async def _judge(self, generation: Generation, text: str, evidence: RetrievedPassage | None) -> Critique:
        """Prompt the model to judge the utility of the text and, given a passage, its relevance and support."""
        groups = [IsRel, IsSup, IsUse] if evidence else [IsUse]
        answers = await gather_all(*(self._ask(QUESTIONS[group], evidence, text) for group in groups))
        with self.requests.critiquing():
            return self._score_answers(generation, dict(zip(groups, answers, strict=True)))

    def _score_answers(self, generation: Generation, answers: Mapping[type[StrEnum], Generation]) -> Critique:
        """Score a segment by the answers to the questions of each group."""
        found = {group: read_probabilities(answer, 0, group) for group, answer in answers.items()}
        scores = {group: expected_value(found[group], VALUES[group]) for group in answers}
        is_rel, is_sup, is_use = (scores.get(group) for group in (IsRel, IsSup, IsUse))
        sequence = sequence_probability(generation, self.critic.newlines | set(self.critic.ends))
        return Critique(
            sequence_probability=sequence,
            is_rel=is_rel,
            is_sup=is_sup,
            is_use=is_use,
            score=segment_score(sequence, is_rel, is_sup, is_use, self.config.weights),
            relevance=choose_likeliest(IsRel, found),
            support=choose_likeliest(IsSup, found),
            utility=choose_likeliest(IsUse, found),
        )

    async def _ask(self, question: str, evidence: RetrievedPassage | None = None, answer: str = "") -> Generation:
        return await self.requests.ask(self._build_question(question, evidence, answer), 1, self.critic.ends)

    def _build_question(self, question: str, evidence: RetrievedPassage | None = None, answer: str = "") -> list[int]:
        """Encode a question up to the first token in which its labels differ."""
        lead = self.critic.labels[question].lead
        prompt, lost = self._encode_prompt(PROMPTS[question]["prompt"], evidence, answer, written=len(lead))
        self.lost += lost
        return prompt + lead

    def _encode_prompt(
        self, template: str, evidence: RetrievedPassage | None = None, answer: str = "", written: int = 0
    ) -> tuple[list[int], int]:
        """Encode a prompt as the user's turn; the end of the passages is cut to leave room for ``written`` more ids.

        Returns:
            The ids, and the number of ids cut.
        """
        values = {"query": format_query(self.query), "answer": answer}
        head, place, tail = template.partition("{passage}")
        body = format_evidence(evidence) if place and evidence else ""
        head, tail = fill_template(head, values), fill_template(tail, values)
        return self.critic.turn.encode_cut(head, body, tail, self.room - written)


def format_query(query: Query) -> str:
    """Format a query for the model: the task's instruction, or the query itself, with its input."""
    context = f"\n\n{query.input}" if query.input else ""
    return f"{query.instruction or query.query}{context}"


def fill_template(template: str, values: Mapping[str, str]) -> str:
    """Fill all placeholders of a template in one pass, since a value may itself look like a placeholder."""
    return re.sub(r"\{(\w+)\}", lambda place: values[place[1]], template)


def choose_likeliest(group: type[Group], found: Mapping[type[StrEnum], Sequence[float]]) -> Group | None:
    """Return the most likely token of a group; None if the model was not prompted for the group."""
    if group not in found:
        return None
    return max(zip(found[group], group, strict=True), key=lambda pair: pair[0])[1]
