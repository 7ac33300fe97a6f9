"""Run the baselines: other ways of running Self-RAG, and the bare engine, all on the engine that our decoding uses.

Three baselines re-create the requests of public short-form scripts, in their order. Our code scores the outputs, so
that the decisions can be compared with ours. None of them requests log-probabilities for an answer without a passage,
which has no rivals.

- *released*: one query at a time. A decision generates a whole answer with 32,016 log-probabilities for each token, the
  answer from each passage has 5,000 (https://github.com/AkariAsai/self-rag, ``run_short_form.py``).
- *naive*: the same steps for all queries at once, one step after the other, with 5,000 log-probabilities.
- *flashrag*: like *naive*, but a decision is one token with its 20 best log-probabilities, and the tokens of an answer
  have their 5 best (https://github.com/RUC-NLPIR/FlashRAG/issues/113 quotes it).

The others run our own requests:

- *direct*: our decoding, called without Ray, files or storage.
- *ceiling*: the prompts and output lengths of *direct*, submitted at once to the bare engine.
- *scored*: like *ceiling*, with the log-probabilities of the 13 reflection tokens, which critique requires.
"""

import asyncio
import dataclasses
import itertools
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from jobs.benchmark.results import Step
from jobs.benchmark.scripted_model import Prompter, Script, ScriptedGenerator, make_endless
from jobs.demo import get_demo_index
from pipeline.config.sections import DecodingConfig, ModelConfig, RetrievalConfig, StorageConfig
from pipeline.decoding.critique import critique_segment, read_retrieve_probability
from pipeline.decoding.profiles import Tasks
from pipeline.decoding.prompts import PromptTokenizer, format_passage
from pipeline.decoding.protocols import Generator
from pipeline.decoding.reflection import Retrieve
from pipeline.decoding.reflection_reader import ReflectionCritic
from pipeline.decoding.self_rag import SelfRag
from pipeline.decoding.types import Answer, Generation, Query, RetrievedPassage
from pipeline.engine.arguments import get_gpu_share
from pipeline.engine.models import load_tokenizer
from pipeline.engine.vllm import VllmGenerator
from pipeline.retrieval.retriever import IndexRetriever
from pipeline.storage.location import locate

# Log-probability that the released scripts assume for a token that is not among those returned.
ABSENT = -100.0
RELEASED_DECISION, RELEASED_CANDIDATE = 32_016, 5_000
FLASHRAG_DECISION, FLASHRAG_CANDIDATE = 20, 5
# Maximum queries of *naive*: decoding its thousands of log-probabilities takes one core minutes.
NAIVE_ROWS = 64
# Variants that may be left out. All are compared with "ours", and "direct" shows how full the engine is.
OPTIONAL = ("ceiling", "scored", "released", "naive", "flashrag")


@dataclass(frozen=True)
class Bench:
    """The engine that all variants but *ours* share, with tokenizer and retriever.

    Attributes:
        memory: MB of GPU memory by component; empty without a GPU.
    """

    generator: VllmGenerator
    tokenizer: PromptTokenizer
    retriever: IndexRetriever
    memory: dict[str, float]

    @classmethod
    def open(cls, model: ModelConfig) -> "Bench":
        """Start the engine and open the demo's index."""
        tokenizer = PromptTokenizer.of(load_tokenizer(model), model.name)
        free = [measure_free_memory()]
        retriever = IndexRetriever.open(
            locate(str(get_demo_index()), StorageConfig()), RetrievalConfig(), get_gpu_share(model)
        )
        free.append(measure_free_memory())
        wide = model.model_copy(update={"engine": {**model.engine, "max_logprobs": -1}})
        generator = VllmGenerator.start(wide, ReflectionCritic(tokenizer).watched)
        free.append(measure_free_memory())
        taken = {name: a - b for name, a, b in zip(("index and encoder", "engine"), free, free[1:], strict=False) if a}
        return cls(generator, tokenizer, retriever, taken)

    def close(self) -> None:
        """Shut down the engine and close the retriever."""
        self.generator.shutdown()
        self.retriever.close()


def measure_free_memory() -> float:
    """Return the free GPU memory in MB; 0 without a GPU."""
    import torch

    return torch.cuda.mem_get_info()[0] / 1e6 if torch.cuda.is_available() else 0.0


@dataclass(frozen=True)
class Outcome:
    """The decision and the answer of a variant for one query."""

    retrieved: bool
    answer: str

    @classmethod
    def of(cls, answer: Answer) -> "Outcome":
        """Return the decision and the first segment of an answer of our decoding."""
        read = any(segment.evidence is not None for segment in answer.segments)
        return cls(read, answer.segments[0].text if answer.segments else "")


@dataclass
class Recorder:
    """A generator that records all its requests.

    Attributes:
        work: prompt and number of generated tokens of each request, in the order in which the requests ended.
    """

    generator: Generator
    work: list[tuple[tuple[int, ...], int]] = field(default_factory=list)

    @property
    def max_model_len(self) -> int:
        """See :attr:`Generator.max_model_len`."""
        return self.generator.max_model_len

    async def generate(self, prompt: Sequence[int], max_tokens: int, stops: Sequence[int]) -> Generation:
        """See :meth:`Generator.generate`."""
        generation = await self.generator.generate(prompt, max_tokens, stops)
        self.work.append((tuple(prompt), len(generation.token_ids)))
        return generation


async def answer_directly(system: SelfRag, queries: Sequence[Query]) -> list[Answer]:
    """Answer all queries concurrently with our decoding."""
    return list(await asyncio.gather(*(system.answer(query) for query in queries)))


@dataclass
class BareEngine:
    """The vLLM engine of a generator, without our own requests.

    Args:
        generator: generator whose engine is used.
    """

    generator: VllmGenerator
    numbers: Any = field(default_factory=lambda: (f"bare-{n}" for n in itertools.count()))

    async def ask(self, prompt: Sequence[int], **sampling: Any) -> Any:
        """Send one request and return vLLM's final output."""
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(temperature=0.0, output_kind=RequestOutputKind.FINAL_ONLY, **sampling)
        stream = self.generator.engine.generate(TokensPrompt(prompt_token_ids=list(prompt)), params, next(self.numbers))
        return [output async for output in stream][-1]

    async def clear_cache(self) -> None:
        """Empty the prefix cache, so that no variant profits from another's prompts."""
        await self.generator.engine.reset_prefix_cache()

    async def replay(self, work: Sequence[tuple[tuple[int, ...], int]], watched: Sequence[int] = ()) -> None:
        """Submit all requests at once, each to generate exactly its recorded number of tokens (*ceiling*).

        Args:
            work: prompt and number of tokens of each request.
            watched: token ids whose log-probabilities are requested (*scored*).
        """
        scored = {"logprob_token_ids": list(watched), "flat_logprobs": True} if watched else {}
        sampling = {"ignore_eos": True, "detokenize": False, **scored}
        await asyncio.gather(*(self.ask(prompt, max_tokens=n, **sampling) for prompt, n in work))


@dataclass(frozen=True)
class Released:
    """The steps of the released short-form script.

    Attributes:
        decision, candidate: number of log-probabilities requested for each token of a decision, and of an answer.
        decision_tokens: maximum tokens of a decision; by default those of an answer.
        prompter: replaces the output by a script's if the model has dummy weights.
    """

    engine: BareEngine
    tokenizer: PromptTokenizer
    config: DecodingConfig
    decision: int = RELEASED_DECISION
    candidate: int = RELEASED_CANDIDATE
    decision_tokens: int | None = None
    prompter: Prompter | None = None

    async def answer_serially(
        self, queries: Sequence[Query], found: Sequence[Sequence[RetrievedPassage]]
    ) -> list[Outcome]:
        """Answer one query after the other; the passages of a query are read concurrently."""
        outcomes = []
        for query, passages in zip(queries, found, strict=True):
            outcomes += await self.answer_in_waves([query], [passages])
        return outcomes

    async def answer_in_waves(
        self, queries: Sequence[Query], found: Sequence[Sequence[RetrievedPassage]]
    ) -> list[Outcome]:
        """Make all decisions, then generate all answers."""
        prompts = [self.tokenizer.encode_prompt(query.query) for query in queries]
        most = self.decision_tokens or self.config.max_tokens
        decisions = await asyncio.gather(*(self._ask(prompt, self.decision, most) for prompt in prompts))
        wanted = [read_retrieve_probability(decision) > self.config.threshold for decision in decisions]
        return list(await asyncio.gather(*(self._answer(*row) for row in zip(prompts, wanted, found, strict=True))))

    async def _answer(self, prompt: list[int], wanted: bool, passages: Sequence[RetrievedPassage]) -> Outcome:
        if not wanted:
            alone = await self._ask(self._build_context(prompt, None), None, self.config.max_tokens)
            return Outcome(wanted, self._decode_text(alone))
        asked = (
            self._ask(self._build_context(prompt, one), self.candidate, self.config.max_tokens) for one in passages
        )
        generations = await asyncio.gather(*asked)
        reflection, eos = self.tokenizer.reflection, self.tokenizer.eos
        segments = [self._cut_first_segment(generation) for generation in generations]
        scores = [critique_segment(segment, reflection, eos, self.config.weights).score for segment in segments]
        return Outcome(wanted, self._decode_text(segments[int(np.argmax(scores))]))

    def _decode_text(self, generation: Generation) -> str:
        non_text_ids = self.tokenizer.reflection.control | {self.tokenizer.eos}
        words = [token for token in self._cut_first_segment(generation).token_ids if token not in non_text_ids]
        return self.tokenizer.decode(words).strip()

    def _build_context(self, prompt: list[int], passage: RetrievedPassage | None) -> list[int]:
        if passage is None:
            return prompt + self.tokenizer.encode_control(Retrieve.NO)
        body = self.tokenizer.encode_text(format_passage(passage.passage.title, passage.passage.text))
        return prompt + self.tokenizer.encode_control(Retrieve.YES) + self.tokenizer.wrap_paragraph(body)

    async def _ask(self, prompt: list[int], logprobs: int | None, max_tokens: int) -> Generation:
        sampling: dict[str, Any] = {"max_tokens": max_tokens, "logprobs": logprobs, "skip_special_tokens": False}
        if self.prompter is not None:
            sampling |= {"max_tokens": self.prompter.script.get_length(max_tokens), "ignore_eos": True}
        output = await self.engine.ask(prompt, **sampling)
        generation = read_wide(output, self.tokenizer.reflection.reflection)
        return generation if self.prompter is None else self.prompter.apply_script(generation, prompt)

    def _cut_first_segment(self, generation: Generation) -> Generation:
        """Cut a generation after its first Retrieve token, where our decoding stops; the scripts generate beyond it."""
        ends = self.tokenizer.reflection.get_group(Retrieve)
        places = [n for n, token in enumerate(generation.token_ids) if token in ends]
        if not places:
            return generation
        end = places[0] + 1
        return dataclasses.replace(
            generation,
            token_ids=generation.token_ids[:end],
            logprobs=generation.logprobs[:end],
            reflection_logprobs=generation.reflection_logprobs[:end],
        )


Run = Callable[[], Awaitable[Any]]


@dataclass(frozen=True)
class Trial:
    """Queries that our decoding has answered once, and the variants that answer them again.

    Attributes:
        system: our decoding.
        ours: outcomes of our decoding.
        work: prompt and number of generated tokens of each request of our decoding.
    """

    bench: Bench
    config: DecodingConfig
    prompter: Prompter | None
    queries: Sequence[Query]
    system: SelfRag
    ours: Sequence[Outcome]
    work: Sequence[tuple[tuple[int, ...], int]]

    @classmethod
    async def begin(
        cls, bench: Bench, config: DecodingConfig, script: Script | None, queries: Sequence[Query]
    ) -> "Trial":
        """Answer the queries with our decoding: warms up the engine and records the requests."""
        prompter = Prompter(bench.tokenizer, script) if script else None
        recorder = Recorder(ScriptedGenerator(make_endless(bench.generator), prompter) if prompter else bench.generator)
        system = SelfRag(recorder, ReflectionCritic(bench.tokenizer), Tasks(config), bench.retriever)
        answers = await answer_directly(system, queries)
        ours = [Outcome.of(answer) for answer in answers]
        return cls(bench, config, prompter, queries, system, ours, tuple(recorder.work))

    @cached_property
    def engine(self) -> BareEngine:
        """The vLLM engine without our own requests."""
        return BareEngine(self.bench.generator)

    def count_tokens(self) -> dict[str, float]:
        """Return the mean number of prompt tokens and of generated tokens of a query in our decoding."""
        read = sum(len(prompt) for prompt, _ in self.work)
        written = sum(count for _, count in self.work)
        return {"prompt": read / len(self.queries), "written": written / len(self.queries)}

    def list_own_variants(self, backwards: bool) -> dict[str, tuple[int, Run]]:
        """Return the variants with exactly the tokens of our decoding: number of queries and run function of each.

        Args:
            backwards: whether to reverse the order; alternating it keeps drift from favoring a variant.
        """
        runs: dict[str, Run] = {
            "direct": lambda: record_steps(self.bench.generator.load, answer_directly(self.system, self.queries)),
            "ceiling": lambda: self.engine.replay(self.work),
            "scored": lambda: self.engine.replay(self.work, self.system.critic.watched),
        }
        names = list(reversed(runs)) if backwards else list(runs)
        return {name: (len(self.queries), runs[name]) for name in names}

    def list_baselines(self, found: Sequence[Sequence[RetrievedPassage]], few: int) -> dict[str, tuple[int, Run]]:
        """Return the baselines of other implementations: number of queries and run function of each.

        Args:
            found: passages of each query.
            few: number of queries for *released*, which answers one at a time.
        """
        queries, some = self.queries, min(NAIVE_ROWS, len(self.queries))
        released = Released(self.engine, self.bench.tokenizer, self.config, prompter=self.prompter)
        naive = dataclasses.replace(released, decision=RELEASED_CANDIDATE)
        flashrag = dataclasses.replace(
            released, decision=FLASHRAG_DECISION, candidate=FLASHRAG_CANDIDATE, decision_tokens=1
        )
        return {
            "released": (few, lambda: released.answer_serially(queries[:few], found[:few])),
            "naive": (some, lambda: naive.answer_in_waves(queries[:some], found[:some])),
            "flashrag": (len(queries), lambda: flashrag.answer_in_waves(queries, found)),
        }

    async def time_variant(self, rows: int, run: Run) -> tuple[float, Any]:
        """Run a variant from an empty prefix cache; return its queries/s and its result."""
        await self.engine.clear_cache()
        began = time.perf_counter()
        outcome = await run()
        return rows / (time.perf_counter() - began), outcome


async def record_steps(load: Any, work: Awaitable[Any]) -> list[Step]:
    """Await some work and return the steps that the engine takes meanwhile."""
    steps: list[Step] = []
    load.on_step = lambda *counts: steps.append(Step(time.perf_counter(), *counts))
    await work
    load.on_step = None
    return steps


def measure_agreement(ours: Sequence[Outcome], theirs: Sequence[Outcome]) -> dict[str, float]:
    """Return the share of queries with the same decision, and the share with the same decision and answer."""
    pairs = list(zip(ours, theirs, strict=False))
    return {
        "decision": statistics.mean(a.retrieved == b.retrieved for a, b in pairs),
        "answer": statistics.mean(a == b for a, b in pairs),
    }


def read_wide(output: Any, wanted: Sequence[int]) -> Generation:
    """Convert a vLLM output whose log-probabilities are dictionaries of the best tokens; others get ``ABSENT``."""
    completion = output.outputs[0]
    positions = completion.logprobs or [{}] * len(completion.token_ids)
    table, chosen = [], []
    for position, token in zip(positions, completion.token_ids, strict=True):
        table.append([_get_logprob(position, watched) for watched in wanted])
        chosen.append(_get_logprob(position, token))
    return Generation(tuple(completion.token_ids), np.array(chosen), np.array(table), len(output.prompt_token_ids))


def _get_logprob(position: Mapping[int, Any], token: int) -> float:
    return position[token].logprob if token in position else ABSENT
