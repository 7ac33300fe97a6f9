"""Makes a language model ready for training, and saves what it has learned."""

import json
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from pipeline.decoding.prompts import PromptTokenizer
from pipeline.decoding.reflection import CONTROL_TOKENS
from pipeline.training.batches import TreeBatch, compute_logits, pad_trees
from pipeline.training.recipe import Recipe
from pipeline.training.trees import LONGEST_TREE, TokenTree, lay_out, make_given, make_taught

log = logging.getLogger(__name__)

# Largest difference that rounding to bfloat16 may make, as a share of the largest logit; branches that are mixed
# differ by as much as the logits themselves.
BRANCH_TOLERANCE = 0.2


@dataclass(frozen=True)
class Student:
    """A model in training.

    Attributes:
        model: causal language model, with an adapter unless all its weights are trained.
        prompts: its tokenizer with the control tokens.
        device: where it is trained.

    The model stays in evaluation mode also in training: without dropout, a batch has the loss of its trees, and an
    interrupted training goes on as it would have.
    """

    model: Any
    prompts: PromptTokenizer
    device: torch.device

    @classmethod
    def load(cls, base: str, tokenizer: Any, recipe: Recipe, adapter: Path | None = None) -> "Student":
        """Load a base model, with the control tokens added and the trainable weights marked.

        Frozen weights are in bfloat16 on a GPU that computes in it; all that is trained is in float32.

        Args:
            base: folder of the base model, or its name on the hub.
            tokenizer: tokenizer of the base model, to which the control tokens are added.
            recipe: hyperparameters.
            adapter: folder of an earlier adapter to continue from.

        Raises:
            ValueError: the tokenizer has no end-of-sequence token, the model has too few layers, or it cannot be
                trained on trees.
        """
        torch.manual_seed(recipe.seed)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        half = computes_in_half(device) and not recipe.full
        if tokenizer.eos_token_id is None:
            raise ValueError(f"model {base}: its tokenizer has no end-of-sequence token; set its eos_token")
        model = load_base(base, torch.bfloat16 if half else torch.float32)
        if recipe.frozen_layers >= model.config.num_hidden_layers:
            raise ValueError(
                f"frozen_layers {recipe.frozen_layers}: {base} has {model.config.num_hidden_layers} layers"
            )
        add_control_tokens(model, tokenizer)
        model = free_all(model, recipe) if recipe.full else attach_adapter(model, tokenizer, recipe, adapter)
        student = cls(model.to(device).eval(), PromptTokenizer.of(tokenizer, base), device)
        student.check_branches(base)
        trained = sum(weight.numel() for weight in student.trainable.values())
        log.info("%s: %s weights are trained on %s", base, f"{trained:,}", describe(device))
        return student

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """The weights that are trained, by name."""
        return {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}

    @property
    def multiple(self) -> int:
        """Number whose multiples are the lengths of batches; a GPU gets few of them, so that it tunes few shapes."""
        return 64 if self.device.type == "cuda" else 1

    @property
    def max_positions(self) -> int:
        """Maximum number of tokens that the model has positions for; that of the longest trees if it says none."""
        return int(getattr(self.model.config, "max_position_embeddings", None) or LONGEST_TREE)

    def load_batch(self, trees: Sequence[TokenTree]) -> TreeBatch:
        """Make a batch of sequences on the model's device."""
        return pad_trees(trees, self.multiple).to(self.device)

    def check_branches(self, base: str) -> None:
        """Check that the branches of a tree do not see each other.

        They do in models whose layers mix tokens otherwise than by attention, such as state-space models.

        Raises:
            ValueError: they do.
        """
        start, *ends = ([7, 8, 9], [10, 11, 12, 13], [14, 15, 16])
        branches = [make_taught(end, 1.0) for end in ends]
        tree = lay_out(make_given(start).with_children(*branches))
        paths = [lay_out(make_given(start).with_children(branch)) for branch in branches]
        with torch.no_grad(), self.choose_precision():
            whole, alone = (compute_logits(self.model, self.load_batch(trees)) for trees in ([tree], paths))
        if (whole - alone).abs().max() > BRANCH_TOLERANCE * alone.abs().max():
            raise ValueError(f"model {base}: {type(self.model).__name__} cannot be trained on trees: it mixes branches")

    def choose_precision(self) -> AbstractContextManager[None]:
        """Return the context to compute in: bfloat16 on a GPU that has it, otherwise float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=computes_in_half(self.device))


def computes_in_half(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 faster than in float32."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def describe(device: torch.device) -> str:
    """Describe a device: the name of a GPU, or the number of CPU threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads"


def load_base(base: str, dtype: torch.dtype) -> Any:
    """Load a causal language model; its embeddings are in float32, since those of the control tokens are trained."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, attn_implementation="sdpa")
    repair_generation(model.generation_config)
    model.get_input_embeddings().float()
    model.get_output_embeddings().float()
    return model


def repair_generation(generation: Any) -> None:
    """Let settings of sampling imply sampling, without which transformers refuses to save them."""
    try:
        generation.validate(strict=True)
    except ValueError:
        generation.do_sample = True


def add_control_tokens(model: Any, tokenizer: Any) -> None:
    """Add the control tokens that a model lacks.

    Each embedding starts as the mean embedding of the token's text, with a little noise, so that no two are equal.
    """
    known = tokenizer.get_vocab()
    pieces = {
        token: tokenizer(token, add_special_tokens=False)["input_ids"] for token in CONTROL_TOKENS if token not in known
    }
    tokenizer.add_special_tokens({"additional_special_tokens": list(CONTROL_TOKENS)})
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for layer in list_embedding_layers(model).values():
        with torch.no_grad():
            for token, ids in pieces.items():
                noise = torch.randn(layer.weight.shape[1]) * layer.weight[ids].std() * 0.1
                layer.weight[tokenizer.convert_tokens_to_ids(token)] = layer.weight[ids].mean(0) + noise


def list_embedding_layers(model: Any) -> dict[str, Any]:
    """List the layers that have a row for each token, by name: one if inputs and outputs are tied, otherwise two."""
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    layers = [inputs] if are_tied(model) else [inputs, outputs]
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(layer)].rpartition(".")[2]: layer for layer in layers}


def are_tied(model: Any) -> bool:
    """Whether the embeddings of inputs and outputs are the same memory."""
    return bool(model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr())


def list_linear_layers(model: Any) -> list[str]:
    """List the names of the linear layers of a model's blocks, without the output layer."""
    output = model.get_output_embeddings()
    kinds = (nn.Linear, Conv1D)
    linear = (name for name, module in model.named_modules() if isinstance(module, kinds) and module is not output)
    return sorted({name.rpartition(".")[2] for name in linear})


def attach_adapter(model: Any, tokenizer: Any, recipe: Recipe, adapter: Path | None) -> PeftModel:
    """Attach a trainable LoRA adapter to the model: a new one, or the one in the folder ``adapter``."""
    stops = recipe.frozen_layers and are_tied(model)  # an adapter hides which weights are tied
    if adapter:
        peft = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    else:
        peft = add_adapter(model, tokenizer, recipe)
    if stops:
        stop_at_embeddings(peft)
    return peft


def add_adapter(model: Any, tokenizer: Any, recipe: Recipe) -> PeftModel:
    """Add a new adapter to the layers that are not frozen, and to the embeddings of the control tokens."""
    ids = tokenizer.convert_tokens_to_ids(list(CONTROL_TOKENS))
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=2 * recipe.rank,
        target_modules=list_linear_layers(model),
        layers_to_transform=list(range(recipe.frozen_layers, model.config.num_hidden_layers)),
        trainable_token_indices=dict.fromkeys(list_embedding_layers(model), ids),
    )
    return get_peft_model(model, config)


def free_all(model: Any, recipe: Recipe) -> Any:
    """Mark all weights as trainable, except those of the frozen layers."""
    model.requires_grad_(True)
    for block in find_blocks(model)[: recipe.frozen_layers]:
        block.requires_grad_(False)
    if recipe.frozen_layers and are_tied(model):
        stop_at_embeddings(model)
    return model


def find_blocks(model: Any) -> nn.ModuleList:
    """Find the list of a model's layers."""
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return next(module for module in lists if len(module) == model.config.num_hidden_layers)


def stop_at_embeddings(model: Any) -> None:
    """Let no gradient reach tied embeddings as inputs, which lie behind the frozen layers.

    They are trained as outputs, and the inputs change along; untied ones would stay as they are.
    """
    model.get_input_embeddings().register_forward_hook(lambda _module, _args, output: output.detach())


def read_adapter(adapter: Path) -> tuple[int, int]:
    """Return the rank of an adapter, and the number of lowest layers without it.

    Raises:
        ValueError: the folder holds no LoRA adapter.
    """
    if not (adapter / "adapter_config.json").is_file():
        raise ValueError(f"{adapter}: no LoRA adapter, since it has no adapter_config.json")
    config = LoraConfig.from_pretrained(str(adapter))
    layers = config.layers_to_transform
    return config.r, min(layers) if isinstance(layers, list) else 0


def save_adapter(model: PeftModel, base: str, output: Path) -> None:
    """Write the adapter in half precision: LoRA matrices and the 15 embeddings, without the other embeddings.

    Args:
        model: model with the adapter.
        base: name of the base model to record in the adapter's configuration.
        output: folder to write to.
    """
    for config in model.peft_config.values():
        config.base_model_name_or_path = base
    model.save_pretrained(str(output), save_embedding_layers=False)
    file = output / "adapter_model.safetensors"
    tensors = {name: tensor.half().contiguous() for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def merge_adapter(base: str, tokenizer: Any, adapter: Path, output: Path) -> None:
    """Write a model folder that vLLM serves: the base model with the adapter merged into it, in bfloat16."""
    model = load_base(base, torch.float32)
    add_control_tokens(model, tokenizer)
    save_model(PeftModel.from_pretrained(model, adapter).merge_and_unload(), tokenizer, output)


def save_model(model: Any, tokenizer: Any, output: Path) -> None:
    """Write a model in bfloat16 with its tokenizer."""
    model.to(torch.bfloat16).save_pretrained(output)
    save_tokenizer(tokenizer, output)


def save_tokenizer(tokenizer: Any, output: Path) -> None:
    """Write a tokenizer, with the setting ``legacy`` that transformers 5 leaves out when it saves one."""
    tokenizer.save_pretrained(output)
    file = output / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    if (legacy := getattr(tokenizer, "legacy", None)) is not None:
        settings["legacy"] = legacy
        file.write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")
