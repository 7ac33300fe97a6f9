"""Trains a LoRA adapter and the reflection tokens' embeddings on training trees."""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score

from pipeline.decoding.prompts import PromptTokenizer
from pipeline.decoding.reflection import CONTROL_TOKENS, GROUPS, IsRel, IsSup, Retrieve
from pipeline.training.recipe import Recipe
from pipeline.training.trees import TokenTree

log = logging.getLogger(__name__)

LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class HeldOut:
    """What a model does on trees it was not trained on; teacher-forced, so each figure costs one pass."""

    decisions: list[bool] = field(default_factory=list)
    answers: list[bool] = field(default_factory=list)
    relevance: list[tuple[bool, float]] = field(default_factory=list)
    support: list[tuple[bool, float]] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        """Decision accuracy, share of answers that greedy decoding gets right, and the AUCs of both judgements."""
        return {
            "decision_accuracy": float(np.mean(self.decisions)),
            "answer_exact": float(np.mean(self.answers)),
            "isrel_auc": float(roc_auc_score(*zip(*self.relevance, strict=True))),
            "issup_auc": float(roc_auc_score(*zip(*self.support, strict=True))),
        }


def add_reflection_tokens(model: Any, tokenizer: Any) -> None:
    """Add the control tokens; each embedding starts as the mean of the words of its own text."""
    pieces = {token: tokenizer(token, add_special_tokens=False)["input_ids"] for token in CONTROL_TOKENS}
    tokenizer.add_special_tokens({"additional_special_tokens": list(CONTROL_TOKENS)})
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    embeddings = model.get_input_embeddings().weight
    with torch.no_grad():
        for token, ids in pieces.items():
            noise = torch.randn(embeddings.shape[1]) * embeddings[ids].std() * 0.1
            embeddings[tokenizer.convert_tokens_to_ids(token)] = embeddings[ids].mean(0) + noise


def attach_adapter(model: Any, tokenizer: Any, recipe: Recipe, adapter: Path | None) -> PeftModel:
    """A trainable adapter on the model: a new one, or an earlier one to go on from."""
    if adapter is not None:
        peft = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    else:
        layers = model.config.num_hidden_layers
        config = LoraConfig(
            r=recipe.rank,
            lora_alpha=2 * recipe.rank,
            target_modules=LINEAR_LAYERS,
            layers_to_transform=list(range(recipe.frozen_layers, layers)),
            trainable_token_indices={"embed_tokens": tokenizer.convert_tokens_to_ids(list(CONTROL_TOKENS))},
        )
        peft = get_peft_model(model, config)
    if recipe.frozen_layers:
        # The tied embeddings learn as outputs; as inputs they follow, without a gradient through frozen layers.
        peft.get_input_embeddings().register_forward_hook(lambda _module, _args, output: output.detach())
    return peft


def log_probabilities(model: Any, tree: TokenTree) -> torch.Tensor:
    """Log-probabilities at the N predictions of a tree: float32 [N, vocabulary]."""
    device = next(model.parameters()).device
    sources, places = np.unique(tree.sources, return_inverse=True)
    logits = model(
        input_ids=torch.from_numpy(tree.ids)[None].to(device),
        attention_mask=torch.from_numpy(tree.visible)[None, None].to(device),
        position_ids=torch.from_numpy(tree.positions)[None].to(device),
        logits_to_keep=torch.from_numpy(sources).to(device),
        use_cache=False,
    ).logits[0]
    return torch.log_softmax(logits.float(), -1)[torch.from_numpy(places).to(device)]


def loss(model: Any, tree: TokenTree) -> torch.Tensor:
    """Sum of the weighted negative log-likelihoods of a tree's targets."""
    logprobs = log_probabilities(model, tree)
    targets = torch.from_numpy(tree.targets).to(logprobs.device)
    weights = torch.from_numpy(tree.weights).to(logprobs.device)
    return -(weights * logprobs.gather(1, targets[:, None])[:, 0]).sum()


def measure_held_out(model: Any, trees: list[TokenTree], tokenizer: PromptTokenizer) -> HeldOut:
    """Judge a model on held-out trees."""
    ids, held_out = tokenizer.reflection, HeldOut()
    retrieve, relevance, support = (set(ids.group(group)) for group in (Retrieve, IsRel, IsSup))
    control = {token for group in GROUPS for token in ids.group(group)}
    model.eval()
    for tree in trees:
        with torch.no_grad():
            logprobs = log_probabilities(model, tree).cpu()
        right = logprobs.argmax(-1).numpy() == tree.targets
        text: dict[int, bool] = {}
        for n, target in enumerate(tree.targets.tolist()):
            if target in retrieve and n == 0:
                held_out.decisions.append(bool(logprobs[n, list(retrieve)].argmax() == list(retrieve).index(target)))
            elif target in relevance:
                odds = float(logprobs[n, ids[IsRel.RELEVANT]] - logprobs[n, ids[IsRel.IRRELEVANT]])
                held_out.relevance.append((target == ids[IsRel.RELEVANT], odds))
            elif target in support:
                odds = float(logprobs[n, ids[IsSup.FULLY]] - logprobs[n, ids[IsSup.NONE]])
                held_out.support.append((target == ids[IsSup.FULLY], odds))
            elif target not in control and target != tokenizer.eos and tree.weights[n] >= 1.0:
                branch = int(tree.branches[n])
                text[branch] = text.get(branch, True) and bool(right[n])
        held_out.answers.extend(text.values())
    model.train()
    return held_out


def save_adapter(model: PeftModel, base: str, output: Path) -> None:
    """Write the adapter in half precision: LoRA matrices and the 15 new embeddings, without the other embeddings.

    Args:
        base: name that the adapter gives as its base model's.
    """
    for config in model.peft_config.values():
        config.base_model_name_or_path = base
    model.save_pretrained(str(output), save_embedding_layers=False)
    file = output / "adapter_model.safetensors"
    tensors = {name: tensor.half().contiguous() for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def step(model: Any, batch: list[TokenTree], optimiser: torch.optim.Optimizer) -> float:
    """One optimiser step; returns the mean weighted loss of the batch's predictions."""
    weight = sum(float(tree.weights.sum()) for tree in batch)
    total = 0.0
    for tree in batch:
        share = loss(model, tree) / weight
        share.backward()  # type: ignore[no-untyped-call]
        total += share.item()
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimiser.step()
    optimiser.zero_grad()
    return total


def train_adapter(
    model: PeftModel,
    trees: Iterator[TokenTree],
    recipe: Recipe,
    progress: Callable[[float], None],
    checkpoint: Callable[[], object],
) -> None:
    """Train until ``recipe.tokens`` are read or ``recipe.minutes`` are over.

    Args:
        progress: called with the share done, before each step; the tree source uses it to lengthen windows.
        checkpoint: called every ``recipe.checkpoint_minutes``; its time does not count.
    """
    torch.manual_seed(recipe.seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    read, steps, seconds, saved, done = 0, 0, 0.0, 0.0, 0.0
    model.train()
    while done < 1.0:
        started = time.monotonic()
        progress(done)
        for group in optimiser.param_groups:
            group["lr"] = recipe.rate(done)
        batch: list[TokenTree] = []
        while sum(len(tree.ids) for tree in batch) < recipe.tokens_per_step:
            batch.append(next(trees))
        mean = step(model, batch, optimiser)
        read += sum(len(tree.ids) for tree in batch)
        steps += 1
        seconds += time.monotonic() - started
        done = max(read / recipe.tokens, seconds / 60 / recipe.minutes)
        if steps % 10 == 0:
            rate = read / seconds
            log.info("step %d: %d tokens (%.1f %%), %.0f tokens/s, loss %.3f", steps, read, 100 * done, rate, mean)
        if seconds - saved > 60 * recipe.checkpoint_minutes:
            checkpoint()
            saved = seconds
