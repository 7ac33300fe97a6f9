"""Runs a model over batches of training trees: padded and masked, with logits only where something is predicted."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from pipeline.training.trees import TokenTree


@dataclass(frozen=True)
class TreeBatch:
    """B sequences of trees, padded to L tokens, with N predictions in all.

    Attributes:
        ids: int64 [B, L], the token ids; 0 for padding.
        positions: int64 [B, L], the number of ancestors of each token; 0 for padding.
        ends: int64 [B, L], the index after the last descendant of each token; padding has no descendants.
        sources: int64 [N], the index in the flattened batch of the token whose output predicts each target.
        targets: int64 [N], the token ids to predict.
        weights: float32 [N], the loss weights of the targets.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    ends: torch.Tensor
    sources: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor

    def to(self, device: torch.device) -> "TreeBatch":
        """Copy the batch to a device."""
        return TreeBatch(*(getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)))

    def build_mask(self) -> torch.Tensor:
        """Build the attention mask: bool [B, 1, L, L], whose row i marks token i and its ancestors.

        Padding attends to itself, since attention to nothing is not a number.
        """
        places = torch.arange(self.ids.shape[1], device=self.ids.device)
        rows = places[:, None]
        return ((places <= rows) & (rows < self.ends[:, None, :]))[:, None]


def group_trees(trees: Iterable[TokenTree], batch_tokens: int, multiple: int = 1) -> Iterator[list[TokenTree]]:
    """Group sequences of similar length in batches of at most ``batch_tokens`` tokens.

    They are padded to a multiple of ``multiple``, which counts. A longer sequence is a batch of its own.
    """
    batch: list[TokenTree] = []
    for tree in sorted(trees, key=len, reverse=True):
        if batch and _round_up(len(batch[0]), multiple) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(tree)
    if batch:
        yield batch


def pad_trees(trees: Sequence[TokenTree], multiple: int = 1) -> TreeBatch:
    """Make a batch of sequences; its length is the longest one's, rounded up to a multiple of ``multiple``."""
    length = _round_up(max(map(len, trees)), multiple)

    def pad(rows: list[npt.NDArray[np.int64]], padding: npt.NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(np.stack([np.concatenate([row, padding[len(row) :]]) for row in rows]))

    zeros = np.zeros(length, np.int64)
    return TreeBatch(
        pad([tree.ids for tree in trees], zeros),
        pad([tree.positions for tree in trees], zeros),
        pad([tree.ends for tree in trees], np.arange(1, length + 1)),
        torch.from_numpy(np.concatenate([tree.sources + length * row for row, tree in enumerate(trees)])),
        torch.from_numpy(np.concatenate([tree.targets for tree in trees])),
        torch.from_numpy(np.concatenate([tree.weights for tree in trees])),
    )


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def compute_logits(model: Any, batch: TreeBatch) -> torch.Tensor:
    """Compute the logits at the N predictions of a batch: float32 [N, vocabulary].

    The hidden states are gathered before the output layer, since logits of all tokens would take most of the memory.
    """

    def gather(_module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden = args[0]
        return (hidden.flatten(0, 1)[batch.sources][None], *args[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(gather)
    try:
        output = model(
            input_ids=batch.ids, attention_mask=batch.build_mask(), position_ids=batch.positions, use_cache=False
        )
    finally:
        hook.remove()
    logits: torch.Tensor = output.logits[0].float()
    return logits


def compute_loss(model: Any, batch: TreeBatch) -> torch.Tensor:
    """Compute the sum of the weighted negative log-likelihoods of a batch's targets."""
    losses = functional.cross_entropy(compute_logits(model, batch), batch.targets, reduction="none")
    return (batch.weights * losses).sum()
