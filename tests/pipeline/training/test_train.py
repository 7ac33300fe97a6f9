"""A tiny model learns two trees by heart: what is trained, what is saved, and what goes on from it."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from pipeline.decoding.prompts import PromptTokenizer
from pipeline.decoding.reflection import CONTROL_TOKENS, IsRel, IsSup, IsUse, Retrieve
from pipeline.demo_models import build_demo_base_model
from pipeline.training.recipe import Recipe
from pipeline.training.train import (
    add_reflection_tokens,
    attach_adapter,
    compute_loss,
    measure_held_out,
    save_adapter,
    train_adapter,
)
from pipeline.training.trees import TokenTree, lay_out, make_given, make_taught

RECIPE = Recipe(tokens=6_000, tokens_per_step=100, rank=4, frozen_layers=1, learning_rate=0.03)


def tiny(adapter: Path | None = None) -> tuple[Any, PromptTokenizer]:
    tokenizer = AutoTokenizer.from_pretrained(build_demo_base_model())
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config)
    add_reflection_tokens(model, tokenizer)
    return attach_adapter(model, tokenizer, RECIPE, adapter), PromptTokenizer.of(tokenizer, "tiny")


def trees(prompts: PromptTokenizer) -> list[TokenTree]:
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


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, PromptTokenizer, list[TokenTree], Path]:
    torch.set_num_threads(1)  # threads cost more than they bring at this size
    model, prompts = tiny()
    lessons = trees(prompts)
    done: list[float] = []
    train_adapter(model, itertools.cycle(lessons), RECIPE, done.append, lambda: None)
    assert done == sorted(done)
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(model, "some/base", folder)
    return model, prompts, lessons, folder


def test_training_lowers_the_loss_and_learns_the_judgments(
    trained: tuple[Any, PromptTokenizer, list[TokenTree], Path],
) -> None:
    model, prompts, lessons, _ = trained
    untrained, _ = tiny()
    with torch.no_grad():
        assert compute_loss(model, lessons[0]) < 0.2 * compute_loss(untrained, lessons[0])
    figures = measure_held_out(model, lessons, prompts).summarize()
    assert (figures["decision_accuracy"], figures["isrel_auc"], figures["issup_auc"]) == (1.0, 1.0, 1.0)


def test_only_the_adapter_is_saved_in_half_precision(
    trained: tuple[Any, PromptTokenizer, list[TokenTree], Path],
) -> None:
    folder = trained[3]
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    embeddings = [tensor for name, tensor in tensors.items() if "embed" in name]
    assert [tuple(tensor.shape) for tensor in embeddings] == [(len(CONTROL_TOKENS), 32)]
    layers = {name.split("layers.")[1].split(".")[0] for name in tensors if "layers." in name}
    assert layers == {"1", "2"}  # layer 0 is frozen
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/base"


def test_training_continues_from_a_saved_adapter(
    trained: tuple[Any, PromptTokenizer, list[TokenTree], Path],
) -> None:
    model, _, lessons, folder = trained
    again, _ = tiny(folder)
    with torch.no_grad():
        assert float(compute_loss(again, lessons[0])) == pytest.approx(float(compute_loss(model, lessons[0])), rel=0.02)
    assert any(parameter.requires_grad for parameter in again.parameters())
