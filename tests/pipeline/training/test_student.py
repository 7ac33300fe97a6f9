"""Students of any base model: tied or not, sharded, with or without a beginning-of-sequence token."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, Lfm2Config, OPTConfig

from pipeline.config.sections import ModelConfig
from pipeline.decoding.prompts import PromptTokenizer
from pipeline.decoding.reflection import CONTROL_TOKENS
from pipeline.engine.models import load_tokenizer
from pipeline.training.batches import compute_loss
from pipeline.training.recipe import Recipe
from pipeline.training.student import Student, merge_adapter, read_adapter, save_adapter, save_model
from tests.support.students import RECIPE, build_trees, load_student, write_base
from tests.support.tokenizers import load_folder, write_llama


def compute_total(student: Student) -> float:
    with torch.no_grad():
        return float(compute_loss(student.model, student.load_batch(build_trees(student.prompts))))


def shake(student: Student) -> Student:
    """Change all trained weights, as a training would."""
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in student.trainable.values():
            weight.add_(0.1 * torch.randn_like(weight))
    return student


def test_control_tokens_begin_as_the_mean_of_their_words(tmp_path: Path) -> None:
    student = load_student(write_base(tmp_path))
    tokenizer = student.prompts.tokenizer
    weights = student.model.get_input_embeddings().weight
    base = AutoTokenizer.from_pretrained(tmp_path)
    mean = weights[base("[Utility:5]")["input_ids"]].mean(0)
    found = weights[tokenizer.convert_tokens_to_ids("[Utility:5]")]
    assert torch.nn.functional.cosine_similarity(found, mean, 0) > 0.9
    assert not torch.equal(found, mean)


@pytest.mark.parametrize("tied", [True, False])
def test_adapter_holds_the_embeddings_that_a_model_has(tmp_path: Path, tied: bool) -> None:
    base = write_base(tmp_path / "base", tie_word_embeddings=tied)
    student = shake(load_student(base))
    save_adapter(student.model, "some/base", tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    embeddings = [name for name, tensor in tensors.items() if tuple(tensor.shape) == (len(CONTROL_TOKENS), 32)]
    assert len(embeddings) == (1 if tied else 2)
    layers = {name.split("layers.")[1].split(".")[0] for name in tensors if "layers." in name}
    assert layers == {"1", "2"}  # layer 0 is frozen
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/base"
    again = load_student(base, adapter=tmp_path / "adapter")
    assert compute_total(again) == pytest.approx(compute_total(student), rel=0.01)
    assert again.trainable.keys() == student.trainable.keys()


@pytest.mark.parametrize("tied", [True, False])
def test_merged_model_answers_as_the_student_does(tmp_path: Path, tied: bool) -> None:
    base = write_base(tmp_path / "base", tie_word_embeddings=tied, shard_size="50KB")
    assert len(list(base.glob("*.safetensors"))) > 1
    student = shake(load_student(base))
    save_adapter(student.model, "some/base", tmp_path / "adapter")
    merge_adapter(str(base), AutoTokenizer.from_pretrained(base), tmp_path / "adapter", tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.dtype == torch.bfloat16
    prompts = PromptTokenizer.of(load_folder(tmp_path / "merged"), "merged")
    assert prompts.reflection == student.prompts.reflection
    merged = Student(model.float(), prompts, student.device)
    assert compute_total(merged) == pytest.approx(compute_total(student), rel=0.02)


def test_all_weights_can_be_trained_and_saved(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    student = shake(load_student(base, Recipe(full=True)))
    assert set(student.trainable) == dict(student.model.named_parameters()).keys()
    save_model(student.model, student.prompts.tokenizer, tmp_path / "saved")
    saved = Student(
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32),
        PromptTokenizer.of(load_folder(tmp_path / "saved"), "saved"),
        student.device,
    )
    assert compute_total(saved) == pytest.approx(compute_total(student), rel=1e-3)


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_frozen_layers_get_no_gradient_but_all_control_tokens_do(tmp_path: Path, full: bool, tied: bool) -> None:
    student = load_student(write_base(tmp_path, tie_word_embeddings=tied), replace(RECIPE, full=full, frozen_layers=2))
    layers = {name.split("layers.")[1][0] for name in student.trainable if "layers." in name}
    assert layers == {"2"}
    compute_loss(student.model, student.load_batch(build_trees(student.prompts))).backward()
    assert all(weight.grad is not None for weight in student.trainable.values())
    reached: list[bool] = []
    first = next(module for name, module in student.model.named_modules() if name.endswith("layers.0"))
    first.register_forward_pre_hook(lambda _module, args: reached.append(args[0].requires_grad))
    compute_total(student)
    compute_loss(student.model, student.load_batch(build_trees(student.prompts)))
    assert reached == [False, not tied]


def test_embeddings_with_room_for_more_tokens_are_not_cut(tmp_path: Path) -> None:
    """Some models have more embeddings than tokens, such as Qwen's."""
    student = load_student(write_base(tmp_path, vocab_size=49_500))
    assert student.model.get_input_embeddings().weight.shape == (49_500, 32)
    assert max(student.prompts.reflection.ids.values()) < 49_500


def test_control_tokens_that_a_model_knows_are_kept(tmp_path: Path) -> None:
    student = shake(load_student(write_base(tmp_path / "base"), Recipe(full=True)))
    before = compute_total(student)
    save_model(student.model, student.prompts.tokenizer, tmp_path / "taught")
    again = load_student(tmp_path / "taught", Recipe(full=True))
    assert compute_total(again) == pytest.approx(before, rel=1e-2)


def test_dropout_is_off_in_training(tmp_path: Path) -> None:
    base = write_base(
        tmp_path, kind=OPTConfig, ffn_dim=64, word_embed_proj_dim=32, dropout=0.5, max_position_embeddings=256
    )
    student = load_student(base)
    batch = student.load_batch(build_trees(student.prompts))
    losses = {float(compute_loss(student.model, batch).detach()) for _ in range(3)}
    assert len(losses) == 1
    assert student.max_positions == 256


def test_adapters_fit_layers_that_are_no_linear_ones(tmp_path: Path) -> None:
    """GPT-2 has layers of another class."""
    student = load_student(write_base(tmp_path, kind=GPT2Config, n_embd=32, n_layer=3, n_head=2))
    assert {name.split(".")[-4] for name in student.trainable if "lora_A" in name} == {"c_attn", "c_proj", "c_fc"}
    before = compute_total(student)
    assert compute_total(shake(student)) != pytest.approx(before, rel=1e-3)


def test_model_that_mixes_branches_is_refused(tmp_path: Path) -> None:
    """Layers of convolutions see the tokens before them, whatever the attention mask says."""
    layers = ["conv", "conv", "full_attention"]
    base = write_base(tmp_path, kind=Lfm2Config, layer_types=layers, num_key_value_heads=2, initializer_range=0.3)
    with pytest.raises(ValueError, match="Lfm2ForCausalLM cannot be trained on trees: it mixes branches"):
        load_student(base, Recipe(full=True))


def test_settings_of_sampling_do_not_prevent_saving(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    file = base / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "temperature": 0.9, "top_p": 0.6}))
    student = load_student(base, Recipe(full=True))
    save_model(student.model, student.prompts.tokenizer, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "generation_config.json").read_text())["temperature"] == 0.9


def test_adapter_tells_its_rank_and_layers(tmp_path: Path) -> None:
    student = load_student(write_base(tmp_path / "base"))
    save_adapter(student.model, "some/base", tmp_path / "adapter")
    assert read_adapter(tmp_path / "adapter") == (RECIPE.rank, RECIPE.frozen_layers)
    with pytest.raises(ValueError, match="nowhere: no LoRA adapter"):
        read_adapter(tmp_path / "nowhere")


@pytest.mark.parametrize("legacy", [True, False, None])
@pytest.mark.parametrize("beginning", [True, False])
def test_saved_tokenizer_encodes_as_in_training(tmp_path: Path, legacy: bool | None, beginning: bool) -> None:
    """A sentencepiece tokenizer of Llama 2's kind, untied embeddings: both are those of the paper's models."""
    tokenizer = load_tokenizer(
        ModelConfig(name=str(write_llama(tmp_path / "l", legacy=legacy, add_bos_token=beginning)))
    )
    base = write_base(tmp_path / "base", tokenizer, tie_word_embeddings=False)
    student = Student.load(str(base), tokenizer, RECIPE)
    save_model(student.model.merge_and_unload(), student.prompts.tokenizer, tmp_path / "saved")
    saved = PromptTokenizer.of(load_folder(tmp_path / "saved"), "saved")
    text = "Rollo led the Normans.\nÉtienne  came"
    assert (saved.encode_prompt(text)[0] == tokenizer.bos_token_id) is beginning
    assert saved.encode_prompt(text) == student.prompts.encode_prompt(text)
    assert saved.encode_passage("Title", text) == student.prompts.encode_passage("Title", text)


def test_frozen_weights_are_halved_where_bfloat16_is_fast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_base(tmp_path)
    exact = compute_total(load_student(base))
    monkeypatch.setattr("pipeline.training.student.computes_in_half", lambda _device: True)
    student = load_student(base)
    assert {weight.dtype for weight in student.trainable.values()} == {torch.float32}
    assert student.model.get_parameter("base_model.model.model.layers.0.mlp.up_proj.weight").dtype == torch.bfloat16
    with student.choose_precision():
        loss = compute_loss(student.model, student.load_batch(build_trees(student.prompts)))
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(exact, rel=0.02)
    loss.backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in student.trainable.values())
    everything = load_student(base, Recipe(full=True))
    assert {weight.dtype for weight in everything.model.parameters()} == {torch.float32}


def test_a_layer_must_be_left_to_train(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"frozen_layers 3: {tmp_path} has 3 layers"):
        load_student(write_base(tmp_path), Recipe(frozen_layers=3))


def test_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        Student.load(str(base), tokenizer, RECIPE)
