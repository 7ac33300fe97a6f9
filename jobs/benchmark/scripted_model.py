"""A model whose engine does the work while a script says what it wrote.

With dummy weights a model writes what means nothing, and the embedded model ends after one segment. The script puts
decisions, critiques and ends where a model
taught for Self-RAG has them, so that requests have realistic lengths and the algorithm goes its usual ways.

``python -m jobs.benchmark.scripted_model --config FILE --queries FILE --index FOLDER --output FOLDER`` annotates so;
the benchmark calls it in the place of ``jobs.annotate``.
"""

import dataclasses
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import typer

from jobs.common import start_logging
from pipeline.config.run import load_config
from pipeline.decoding.profiles import Tasks
from pipeline.decoding.prompts import PromptTokenizer
from pipeline.decoding.reflection import REFLECTION_TOKENS, IsRel, IsSup, IsUse, Paragraph, Retrieve
from pipeline.decoding.reflection_reader import ReflectionCritic
from pipeline.decoding.self_rag import SelfRag
from pipeline.decoding.types import Generation
from pipeline.demo_models import demo_model
from pipeline.engine.models import load_tokenizer
from pipeline.engine.vllm import VllmGenerator
from pipeline.run.actor import SelfRagActor
from pipeline.run.driver import allot_resources, run_plan
from pipeline.run.plan import check_run

# Arguments of a LlamaConfig. The first is selfrag/selfrag_llama2_7b's but for its vocabulary, which is the demo
# tokenizer's (49,167 instead of 32,016 tokens): https://huggingface.co/selfrag/selfrag_llama2_7b
SHAPES: dict[str, dict[str, int]] = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
}
CONTEXT_TOKENS = 4096
# The script of an actor, from its environment, as JSON.
SCRIPT = "SELFRAG_BENCHMARK_SCRIPT"
# Natural-log probabilities of the reflection token that stands somewhere, and of all others.
WRITTEN, OTHERS = -0.1, -5.0
# Digits of the number at the beginning of a segment.
DIGITS = 5


def write_shape(name: str, folder: Path) -> Path:
    """A model folder with a configuration and a tokenizer, and no weights."""
    from transformers import AutoTokenizer, LlamaConfig

    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=CONTEXT_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        **SHAPES[name],
    )
    config.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Script:
    """What is taken to have been written.

    Attributes:
        retrieve: share of the queries that retrieve; which ones, their prompts' digests say.
        tokens: of a segment, its critique and its end included.
        segments: of an answer.
    """

    retrieve: float = 1.0
    tokens: int = 40
    segments: int = 1

    def length(self, max_tokens: int) -> int:
        """Tokens that a request writes."""
        return min(self.tokens, max_tokens)


@dataclass(frozen=True)
class Prompter:
    """Puts a script's tokens into what an engine wrote; cheap, since it runs beside what is measured."""

    tokenizer: PromptTokenizer
    script: Script

    @cached_property
    def decided(self) -> frozenset[int]:
        """Tokens of which every prompt has one, but those that ask for the first decision."""
        return frozenset(self.tokenizer.reflection.group(Retrieve))

    @cached_property
    def non_text_ids(self) -> frozenset[int]:
        """Tokens that are no text."""
        return self.tokenizer.reflection.control | {self.tokenizer.eos}

    @cached_property
    def places(self) -> dict[int, int]:
        """Columns of the reflection tokens."""
        return {token: n for n, token in enumerate(self.tokenizer.reflection.reflection)}

    @cached_property
    def digits(self) -> list[int]:
        """Tokens of the ten digits."""
        return [self.tokenizer.text(digit)[-1] for digit in "0123456789"]

    def decision(self, prompt: Sequence[int]) -> Retrieve:
        """Whether the query retrieves."""
        return Retrieve.YES if digest(prompt) < self.script.retrieve * 2**32 else Retrieve.NO

    def frame(self, prompt: Sequence[int]) -> tuple[list[int], list[int]]:
        """First and last ids of what follows a prompt."""
        ids = self.tokenizer.reflection
        if self.decided.isdisjoint(prompt):
            return [ids[self.decision(prompt)]], [self.tokenizer.eos]
        if not (read := list(prompt).count(ids[Paragraph.END])):
            return [], [ids[IsUse.FIVE], self.tokenizer.eos]
        end = ids[Retrieve.YES] if read < self.script.segments else self.tokenizer.eos
        return [ids[IsRel.RELEVANT]], [ids[IsSup.FULLY], ids[IsUse.FIVE], end]

    def acted(self, generation: Generation, prompt: Sequence[int]) -> Generation:
        """A generation with the script's reflection tokens and end; its other tokens become text.

        Digits go before the text, for equal texts would be merged in the beam.
        """
        first, last = self.frame(prompt)
        length = len(generation.token_ids)
        number = [self.digits[int(digit)] for digit in str(digest(prompt))[-DIGITS:]]
        text = [*number, *(number[0] if i in self.non_text_ids else i for i in generation.token_ids)]
        ids = [*first, *text[: max(0, length - len(first) - len(last))], *last][:length]
        table = np.full((length, len(REFLECTION_TOKENS)), OTHERS)
        for position, token in enumerate(ids):
            if token in self.places:
                table[position, self.places[token]] = WRITTEN
        return dataclasses.replace(generation, token_ids=tuple(ids), reflection_logprobs=table)


def digest(prompt: Sequence[int]) -> int:
    """A number below 2^32 that a prompt always has."""
    return zlib.crc32(np.array(prompt, np.int32).tobytes())


@dataclass(frozen=True)
class ScriptedGenerator:
    """A vLLM replica whose answers have the script's lengths and reflection tokens.

    Args:
        replica: one that :func:`endless` made.
    """

    replica: VllmGenerator
    prompter: Prompter

    @property
    def max_model_len(self) -> int:
        """See :attr:`pipeline.decoding.protocols.Generator.max_model_len`."""
        return self.replica.max_model_len

    async def generate(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        stops: Sequence[int],  # noqa: ARG002  the script says where it ends
    ) -> Generation:
        """See :meth:`pipeline.decoding.protocols.Generator.generate`."""
        generation = await self.replica.generate(prompt, self.prompter.script.length(max_tokens), ())
        return self.prompter.acted(generation, prompt)


def endless(replica: VllmGenerator) -> VllmGenerator:
    """The same replica, whose requests end at their lengths alone."""
    return dataclasses.replace(replica, sampling={**replica.sampling, "ignore_eos": True})


class ScriptedActor(SelfRagActor):
    """An actor with such a replica."""

    def _open(self, servers: Sequence[Any], index_digest: str | None) -> None:
        super()._open(servers, index_digest)
        tokenizer = PromptTokenizer.of(load_tokenizer(self.config.model), self.config.model.name)
        prompter = Prompter(tokenizer, Script(**json.loads(os.environ[SCRIPT])))
        engine = ScriptedGenerator(endless(self.generator), prompter)
        self.system = SelfRag(engine, ReflectionCritic(tokenizer), Tasks(self.config.decoding), self.retriever)


def annotate_scripted(
    config: Path = typer.Option(...),
    queries: str = typer.Option(...),
    index: str = typer.Option(...),
    output: str = typer.Option(...),
    as_json: bool = typer.Option(True, "--json"),  # noqa: ARG001  as jobs.annotate has it
) -> None:
    """Annotate with a scripted model; prints a summary as JSON."""
    start_logging()
    plan = check_run(load_config(str(config), [], {"queries": queries, "index": index, "output": output}))
    typer.echo(json.dumps(dataclasses.asdict(run_plan(plan, allot_resources(plan), ScriptedActor))))


if __name__ == "__main__":
    # Ray copies the classes of __main__ instead of importing them, and locks in them cannot be copied.
    from jobs.benchmark import scripted_model

    typer.run(scripted_model.annotate_scripted)
