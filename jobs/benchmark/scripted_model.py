"""Annotate with a model whose engine does all its work but whose output is replaced by a script's.

A model with dummy weights writes text without meaning, and the embedded model ends an answer after one segment. The
script puts decisions, critiques and ends where a model trained for Self-RAG has them, so that requests have realistic
lengths and the algorithm takes its usual paths.

``python -m jobs.benchmark.scripted_model --config FILE --queries FILE --index FOLDER --output FOLDER`` runs in place of
``jobs.annotate`` in the benchmark.
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
from jobs.shell import run
from pipeline.config.run import load_config
from pipeline.decoding.profiles import Tasks
from pipeline.decoding.prompts import PromptTokenizer
from pipeline.decoding.reflection import REFLECTION_TOKENS, IsRel, IsSup, IsUse, Paragraph, Retrieve
from pipeline.decoding.reflection_reader import ReflectionCritic
from pipeline.decoding.self_rag import SelfRag
from pipeline.decoding.types import Generation
from pipeline.demo_models import build_demo_model
from pipeline.engine.models import load_tokenizer
from pipeline.engine.vllm import VllmGenerator
from pipeline.retrieval.retriever import SearchDigests
from pipeline.run.actor import SelfRagActor
from pipeline.run.driver import allot_resources, run_plan
from pipeline.run.plan import check_run

# Arguments of a LlamaConfig. The first is selfrag/selfrag_llama2_7b's except for the vocabulary, which is the demo
# tokenizer's (49,167 instead of 32,016 tokens): https://huggingface.co/selfrag/selfrag_llama2_7b
SHAPES: dict[str, dict[str, int]] = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
}
CONTEXT_TOKENS = 4096
# Environment variable of the actors: the script, as JSON.
SCRIPT = "SELFRAG_BENCHMARK_SCRIPT"
# Natural-log probabilities of the reflection token at a position, and of all other reflection tokens.
WRITTEN, OTHERS = -0.1, -5.0
# Digits of the number with which the text of a segment begins.
DIGITS = 5


def write_shape(name: str, folder: Path) -> Path:
    """Write a model folder with configuration and tokenizer but without weights; return it."""
    from transformers import AutoTokenizer, LlamaConfig

    tokenizer = AutoTokenizer.from_pretrained(build_demo_model())
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
    """The parameters of the scripted output.

    Attributes:
        retrieve: share of the queries that retrieve; the digest of a query's prompt decides.
        tokens: tokens of a segment, including its critique and its end.
        segments: segments of an answer.
    """

    retrieve: float = 1.0
    tokens: int = 40
    segments: int = 1

    def get_length(self, max_tokens: int) -> int:
        """Return the number of tokens that a request generates."""
        return min(self.tokens, max_tokens)


@dataclass(frozen=True)
class Prompter:
    """The replacement of an engine's output by a script's; cheap, since it runs during the measurement."""

    tokenizer: PromptTokenizer
    script: Script

    @cached_property
    def decided(self) -> frozenset[int]:
        """Ids of the Retrieve tokens; every prompt but that of the first decision contains one."""
        return frozenset(self.tokenizer.reflection.get_group(Retrieve))

    @cached_property
    def non_text_ids(self) -> frozenset[int]:
        """Ids of the tokens that are not text."""
        return self.tokenizer.reflection.control | {self.tokenizer.eos}

    @cached_property
    def places(self) -> dict[int, int]:
        """Column of each reflection token's id in the table of log-probabilities."""
        return {token: n for n, token in enumerate(self.tokenizer.reflection.reflection)}

    @cached_property
    def digits(self) -> list[int]:
        """Ids of the ten digits' tokens."""
        return [self.tokenizer.encode_text(digit)[-1] for digit in "0123456789"]

    def decide(self, prompt: Sequence[int]) -> Retrieve:
        """Return the first decision for a prompt."""
        return Retrieve.YES if hash_prompt(prompt) < self.script.retrieve * 2**32 else Retrieve.NO

    def build_frame(self, prompt: Sequence[int]) -> tuple[list[int], list[int]]:
        """Return the ids with which the scripted output for a prompt begins, and those with which it ends."""
        ids = self.tokenizer.reflection
        if self.decided.isdisjoint(prompt):
            return [ids[self.decide(prompt)]], [self.tokenizer.eos]
        if not (read := list(prompt).count(ids[Paragraph.END])):
            return [], [ids[IsUse.FIVE], self.tokenizer.eos]
        end = ids[Retrieve.YES] if read < self.script.segments else self.tokenizer.eos
        return [ids[IsRel.RELEVANT]], [ids[IsSup.FULLY], ids[IsUse.FIVE], end]

    def apply_script(self, generation: Generation, prompt: Sequence[int]) -> Generation:
        """Return the generation with the script's reflection tokens and end; all its other tokens become text.

        The text begins with digits of the prompt's digest, since the beam would merge equal texts.
        """
        first, last = self.build_frame(prompt)
        length = len(generation.token_ids)
        number = [self.digits[int(digit)] for digit in str(hash_prompt(prompt))[-DIGITS:]]
        replaced = dict.fromkeys(self.non_text_ids, number[0])
        text = [*number, *(replaced.get(token, token) for token in generation.token_ids)]
        ids = [*first, *text[: max(0, length - len(first) - len(last))], *last][:length]
        table = np.full((length, len(REFLECTION_TOKENS)), OTHERS)
        for position, token in enumerate(ids):
            if token in self.places:
                table[position, self.places[token]] = WRITTEN
        return dataclasses.replace(generation, token_ids=tuple(ids), reflection_logprobs=table)


def hash_prompt(prompt: Sequence[int]) -> int:
    """Return the CRC-32 of a prompt: a number below 2^32."""
    return zlib.crc32(np.array(prompt, np.int32).tobytes())


@dataclass(frozen=True)
class ScriptedGenerator:
    """A vLLM replica whose generations have the script's lengths and reflection tokens.

    Args:
        replica: replica that :func:`make_endless` returned.
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
        stops: Sequence[int],  # noqa: ARG002  the script sets the length
    ) -> Generation:
        """See :meth:`pipeline.decoding.protocols.Generator.generate`."""
        generation = await self.replica.generate(prompt, self.prompter.script.get_length(max_tokens), ())
        return self.prompter.apply_script(generation, prompt)


def make_endless(replica: VllmGenerator) -> VllmGenerator:
    """Return the replica with requests that end only at their maximum length."""
    return dataclasses.replace(replica, sampling={**replica.sampling, "ignore_eos": True})


class ScriptedActor(SelfRagActor):
    """An actor with a scripted replica."""

    def _open(self, servers: Sequence[Any], digests: SearchDigests) -> None:
        super()._open(servers, digests)
        tokenizer = PromptTokenizer.of(load_tokenizer(self.config.model), self.config.model.name)
        prompter = Prompter(tokenizer, Script(**json.loads(os.environ[SCRIPT])))
        engine = ScriptedGenerator(make_endless(self.generator), prompter)
        self.system = SelfRag(engine, ReflectionCritic(tokenizer), Tasks(self.config.decoding), self.retriever)


def annotate_scripted(
    config: Path = typer.Option(...),
    queries: str = typer.Option(...),
    index: str = typer.Option(...),
    output: str = typer.Option(...),
    as_json: bool = typer.Option(True, "--json"),  # noqa: ARG001  as jobs.annotate has it
) -> None:
    """Annotate with a scripted model and print the summary as JSON."""
    start_logging()
    plan = check_run(load_config(str(config), [], {"queries": queries, "index": index, "output": output}))
    typer.echo(json.dumps(dataclasses.asdict(run_plan(plan, allot_resources(plan), ScriptedActor))))


if __name__ == "__main__":
    # Ray pickles the classes of __main__ by value instead of importing them, which fails for the locks in them.
    from jobs.benchmark import scripted_model

    run(scripted_model.annotate_scripted)
