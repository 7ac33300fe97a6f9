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
    """Predictions of a model on held-out trees, with teacher forcing, so that each tree costs one forward pass.

    Attributes:
        decisions: for each tree, whether the right retrieval token is the most probable one at the start.
        answers: for each answer, whether greedy decoding writes all of its tokens.
        relevance: for each IsRel target, whether it is ``[Relevant]``, and the model's log-odds of it.
        support: for each IsSup target, whether it is ``[Fully supported]``, and the model's log-odds of it against
            ``[No support / Contradictory]``.
    """

    decisions: list[bool] = field(default_factory=list)
    answers: list[bool] = field(default_factory=list)
    relevance: list[tuple[bool, float]] = field(default_factory=list)
    support: list[tuple[bool, float]] = field(default_factory=list)

    def summarize(self) -> dict[str, float]:
        """Compute the decision accuracy, the share of answers that greedy decoding gets right, and two ROC AUCs."""
        return {
            "decision_accuracy": float(np.mean(self.decisions)),
            "answer_exact": float(np.mean(self.answers)),
            "isrel_auc": float(roc_auc_score(*zip(*self.relevance, strict=True))),
            "issup_auc": float(roc_auc_score(*zip(*self.support, strict=True))),
        }


def add_reflection_tokens(model: Any, tokenizer: Any) -> None:
    """Add the control tokens; each embedding starts as the mean embedding of the token's text, with a little noise."""
    pieces = {token: tokenizer(token, add_special_tokens=False)["input_ids"] for token in CONTROL_TOKENS}
    tokenizer.add_special_tokens({"additional_special_tokens": list(CONTROL_TOKENS)})
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    embeddings = model.get_input_embeddings().weight
    with torch.no_grad():
        for token, ids in pieces.items():
            noise = torch.randn(embeddings.shape[1]) * embeddings[ids].std() * 0.1
            embeddings[tokenizer.convert_tokens_to_ids(token)] = embeddings[ids].mean(0) + noise


def attach_adapter(model: Any, tokenizer: Any, recipe: Recipe, adapter: Path | None) -> PeftModel:
    """Attach a trainable LoRA adapter to the model: a new one, or the one in the folder ``adapter``."""
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
        # The embeddings are tied: they are trained as outputs, and the inputs change along, without a gradient through
        # the frozen layers.
        peft.get_input_embeddings().register_forward_hook(lambda _module, _args, output: output.detach())
    return peft


def compute_logprobs(model: Any, tree: TokenTree) -> torch.Tensor:
    """Compute the log-probabilities at the N predictions of a tree: float32 [N, vocabulary]."""
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


def compute_loss(model: Any, tree: TokenTree) -> torch.Tensor:
    """Compute the sum of the weighted negative log-likelihoods of a tree's targets."""
    logprobs = compute_logprobs(model, tree)
    targets = torch.from_numpy(tree.targets).to(logprobs.device)
    weights = torch.from_numpy(tree.weights).to(logprobs.device)
    return -(weights * logprobs.gather(1, targets[:, None])[:, 0]).sum()


def measure_held_out(model: Any, trees: list[TokenTree], tokenizer: PromptTokenizer) -> HeldOut:
    """Evaluate a model on held-out trees."""
    ids, held_out = tokenizer.reflection, HeldOut()
    retrieve, relevance, support = (set(ids.get_group(group)) for group in (Retrieve, IsRel, IsSup))
    control = {token for group in GROUPS for token in ids.get_group(group)}
    model.eval()
    for tree in trees:
        with torch.no_grad():
            logprobs = compute_logprobs(model, tree).cpu()
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


def take_step(model: Any, batch: list[TokenTree], optimizer: torch.optim.Optimizer) -> float:
    """Take one optimizer step and return the weighted mean loss of the batch's predictions."""
    weight = sum(float(tree.weights.sum()) for tree in batch)
    total = 0.0
    for tree in batch:
        share = compute_loss(model, tree) / weight
        share.backward()  # type: ignore[no-untyped-call]
        total += share.item()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return total


def train_adapter(
    model: PeftModel,
    trees: Iterator[TokenTree],
    recipe: Recipe,
    progress: Callable[[float], None],
    checkpoint: Callable[[], object],
) -> None:
    """Train for ``recipe.tokens`` tokens or ``recipe.minutes`` minutes, whichever ends first.

    Args:
        model: model with a trainable adapter.
        trees: training trees, without end.
        recipe: hyperparameters.
        progress: callback before each step with the share of the training done, by which the caller lengthens windows.
        checkpoint: callback every ``recipe.checkpoint_minutes``; its time does not count as training time.
    """
    torch.manual_seed(recipe.seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    read, steps, seconds, saved, done = 0, 0, 0.0, 0.0, 0.0
    model.train()
    while done < 1.0:
        started = time.monotonic()
        progress(done)
        for group in optimizer.param_groups:
            group["lr"] = recipe.compute_rate(done)
        batch: list[TokenTree] = []
        while sum(len(tree.ids) for tree in batch) < recipe.tokens_per_step:
            batch.append(next(trees))
        mean = take_step(model, batch, optimizer)
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
