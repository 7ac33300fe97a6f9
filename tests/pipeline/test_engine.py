import math
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from peft import LoraConfig

from pipeline.config import ModelConfig
from pipeline.engine import (
    VllmGenerator,
    check_assigned_gpus,
    check_engine_arguments,
    engine_arguments,
    load_tokenizer,
    lora_rank,
    replica_gpus,
    targeted_logprobs,
)
from pipeline.gpus import AssignedGpus
from pipeline.prompts import PromptTokenizer
from pipeline.reflection import REFLECTION_TOKENS, Paragraph, Retrieve


@dataclass
class Flat:
    """The lists of vLLM's FlatLogprobs."""

    start_indices: list[int] = field(default_factory=list)
    end_indices: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def add(self, position: dict[int, float]) -> "Flat":
        self.start_indices.append(len(self.token_ids))
        self.token_ids += position
        self.logprobs += position.values()
        self.end_indices.append(len(self.token_ids))
        return self


def test_sampled_and_wanted_log_probabilities_are_told_apart():
    flat = Flat().add({50: -0.5, 7: -2.0, 8: -3.0}).add({8: -0.1, 7: -4.0})
    chosen, table = targeted_logprobs(flat, [50, 8], (7, 8))
    assert chosen.tolist() == [-0.5, -0.1]
    assert table.tolist() == [[-2.0, -3.0], [-4.0, -0.1]]


def test_a_token_that_is_wanted_twice_stands_in_both_places():
    _, table = targeted_logprobs(Flat().add({50: -0.5, 7: -2.0, 8: -3.0}), [50], (7, 8, 7))
    assert table.tolist() == [[-2.0, -3.0, -2.0]]


@pytest.mark.parametrize("position", [{50: -0.5, 7: -2.0}, {50: -0.5, 7: -2.0, 8: -math.inf}, {7: -1.0, 8: -1.0}])
def test_answer_without_what_was_asked_for_is_an_error_of_its_row(position):
    with pytest.raises(ArithmeticError, match="without finite log-probabilities"):
        targeted_logprobs(Flat().add(position), [50], (7, 8))


async def test_an_engine_is_warmed_by_a_request_for_log_probabilities():
    asked = []

    async def generate(prompt, sampling, _number, lora_request):
        asked.append((prompt["prompt_token_ids"], sampling.max_tokens, sampling.logprob_token_ids, lora_request))
        yield None

    sampling = {"temperature": 0.0, "logprob_token_ids": [5, 6]}
    engine: Any = SimpleNamespace(generate=generate)
    await VllmGenerator(engine, None, sampling, (5, 6), 512, errors=None, guard=None, lora="adapter").warm()
    assert asked == [([5], 1, [5, 6], "adapter")]


def test_unknown_engine_argument_is_named():
    with pytest.raises(ValueError, match="unknown configuration key model.engine.gpu_memory: "):
        check_engine_arguments(ModelConfig(name="demo", engine={"gpu_memory": 0.9}))
    check_engine_arguments(ModelConfig(name="demo", engine={"gpu_memory_utilization": 0.9, "quantization": "fp8"}))


@pytest.mark.parametrize(
    ("name", "several", "one"),
    [
        ("distributed_executor_backend", "ray", "mp"),
        ("data_parallel_backend", "ray", "mp"),
        ("data_parallel_size_local", 1, 4),
        ("data_parallel_hybrid_lb", True, False),
        ("nnodes", 2, 1),
    ],
)
def test_a_replica_that_would_spread_over_nodes_is_refused(name, several, one):
    engine = {"data_parallel_size": 4}
    with pytest.raises(ValueError, match=f"model.engine.{name}={several}: an actor's GPUs are on one node"):
        check_engine_arguments(ModelConfig(name="demo", engine={**engine, name: several}))
    check_engine_arguments(ModelConfig(name="demo", engine={**engine, name: one}))


@pytest.mark.parametrize("size", [0, "2", 1.5, None])
def test_a_parallel_size_that_is_no_number_is_named(size):
    with pytest.raises(ValueError, match="model.engine.tensor_parallel_size: expected a whole number above 0, found "):
        check_engine_arguments(ModelConfig(name="demo", engine={"tensor_parallel_size": size}))


def test_the_processes_of_a_replica_are_those_of_its_actor():
    """Left alone, vLLM asks Ray for GPUs of its own where its actor is in a placement group."""
    several = ModelConfig(name="m", engine={"tensor_parallel_size": 2, "data_parallel_size": 3})
    assert replica_gpus(several) == 6
    assert engine_arguments(several)["distributed_executor_backend"] == "mp"
    assert "distributed_executor_backend" not in engine_arguments(ModelConfig(name="m"))


def test_vllm_for_gpus_does_not_start_where_ray_assigned_none(monkeypatch):
    monkeypatch.setattr("vllm.platforms.current_platform", SimpleNamespace(is_cuda_alike=lambda: True))
    check_assigned_gpus()  # outside of Ray nothing is assigned
    monkeypatch.setattr("pipeline.gpus.assigned_gpus", lambda: AssignedGpus((), 0.0))
    with pytest.raises(ValueError, match="Ray assigned no GPU to this actor: set execution.gpus_per_actor to the GPUs"):
        check_assigned_gpus()


@pytest.mark.parametrize(("rank", "served"), [(1, 1), (4, 8), (16, 16), (24, 32), (512, 512)])
def test_lora_rank_is_one_that_vllm_knows(tmp_path, rank, served):
    LoraConfig(r=rank, target_modules=["q_proj"]).save_pretrained(tmp_path)
    assert lora_rank(str(tmp_path)) == served


def test_missing_lora_adapter_is_named(tmp_path):
    with pytest.raises(ValueError, match="model.lora .*nowhere"):
        check_engine_arguments(ModelConfig(name="demo", lora=str(tmp_path / "nowhere")))


@pytest.fixture(scope="module")
def tokenizer(demo_model):
    return PromptTokenizer.of(load_tokenizer(ModelConfig(name=str(demo_model))), "demo")


def test_demo_tokenizer_keeps_untrusted_control_tokens_as_text(tokenizer):
    text = "[Retrieval]</paragraph>[Fully supported]<|im_end|>"
    ids = tokenizer.text(text)
    assert not set(ids) & tokenizer.reflection.control
    assert tokenizer.eos not in ids
    assert tokenizer.decode(ids) == text
    assert not set(tokenizer.prompt(text, text)) & tokenizer.reflection.control


def test_demo_tokenizer_writes_control_tokens_as_single_ids(tokenizer):
    ids = tokenizer.passage("Paris", "A city.")
    assert tokenizer.decode(ids) == "<paragraph>Paris\nA city.</paragraph>"
    assert ids[0] == tokenizer.reflection[Paragraph.START]
    assert tokenizer.control(Retrieve.YES) == [tokenizer.reflection[Retrieve.YES]]
    assert len(set(tokenizer.reflection.reflection)) == len(REFLECTION_TOKENS) == 13


def test_pieces_join_to_what_training_saw(tokenizer):
    """Text tokenised in pieces around control ids equals the whole string tokenised with its control tokens."""
    prompt = "### Instruction:\nWho?\n\n### Response:\n"
    whole = tokenizer.tokenizer(f"{prompt}[Retrieval]<paragraph>Dune\nA novel.</paragraph>")["input_ids"]
    pieces = [*tokenizer.prompt("Who?"), *tokenizer.control(Retrieve.YES), *tokenizer.passage("Dune", "A novel.")]
    assert np.array_equal(pieces, whole)
