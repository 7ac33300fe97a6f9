"""Tiny students: models with random weights and the tokenizer of the embedded one, or one of Llama 2's kind."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from pipeline.decoding.prompts import PromptTokenizer
from pipeline.decoding.reflection import IsRel, IsSup, IsUse, Retrieve
from pipeline.demo_models import build_demo_base_model
from pipeline.training.recipe import Recipe
from pipeline.training.student import Student
from pipeline.training.trees import TokenTree, lay_out, make_given, make_taught

RECIPE = Recipe(tokens=6_000, step_tokens=100, rank=4, frozen_layers=1, learning_rate=0.03)


def write_base(
    folder: Path, tokenizer: Any = None, shard_size: str = "5GB", kind: Any = LlamaConfig, **settings: Any
) -> Path:
    """Write a model of three layers without control tokens, with the embedded model's tokenizer by default."""
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(build_demo_base_model())
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    defaults = {"vocab_size": len(tokenizer), "tie_word_embeddings": True, **sizes}
    AutoModelForCausalLM.from_config(kind(**{**defaults, **settings})).save_pretrained(
        folder, max_shard_size=shard_size
    )
    tokenizer.save_pretrained(folder)
    return folder


def load_student(base: Path, recipe: Recipe = RECIPE, adapter: Path | None = None) -> Student:
    """Load a model of :func:`write_base` for training."""
    torch.set_num_threads(1)  # threads cost more than they bring at this size
    return Student.load(str(base), AutoTokenizer.from_pretrained(base), recipe, adapter)


def build_trees(prompts: PromptTokenizer) -> list[TokenTree]:
    """A question with a right and a wrong passage and two judged answers, and an instruction."""
    end = make_taught(prompts.encode_control(IsUse.FIVE), 1.0) + make_given([prompts.eos])
    # The words' own embeddings are random and stay so: only control tokens can be learned.
    right = make_taught(prompts.encode_control(IsRel.RELEVANT), 1.0)
    answers = [
        right + make_given(prompts.encode_text(text)) + make_taught(prompts.encode_control(support), 1.0) + end
        for text, support in (("Rollo", IsSup.FULLY), ("Bjorn", IsSup.NONE))
    ]
    passage = make_given(prompts.encode_passage("Normans", "Rollo led them.")).with_children(*answers)
    wrong = (
        make_given(prompts.encode_passage("Sharks", "They swim."))
        + make_taught(prompts.encode_control(IsRel.IRRELEVANT), 1.0)
        + end
    )
    question = make_given(prompts.encode_prompt("Who led?")) + make_taught(prompts.encode_control(Retrieve.YES), 1.0)
    instruction = (
        make_given(prompts.encode_prompt("Say hi")) + make_taught(prompts.encode_control(Retrieve.NO), 1.0) + end
    )
    return [lay_out(question.with_children(passage, wrong)), lay_out(instruction)]
