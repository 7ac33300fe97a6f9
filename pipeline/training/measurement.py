"""Evaluates a model on held-out trees with teacher forcing, so that each tree costs one forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from sklearn.metrics import roc_auc_score

from pipeline.decoding.prompts import PromptTokenizer
from pipeline.decoding.reflection import GROUPS, IsRel, IsSup, Retrieve
from pipeline.training.batches import compute_logits, group_trees
from pipeline.training.student import Student
from pipeline.training.trees import TokenTree

Logprobs = npt.NDArray[np.float32]


@dataclass
class HeldOut:
    """Predictions of a model on held-out trees.

    Attributes:
        decisions: for each tree, whether it should retrieve, and whether the model decides so at the start.
        answers: for each answer, whether greedy decoding writes all of its tokens.
        relevance: for each IsRel target, whether it is ``[Relevant]``, and the model's log-odds of it.
        support: for each IsSup target, whether it is ``[Fully supported]``, and the model's log-odds of it against
            ``[No support / Contradictory]``.
    """

    decisions: list[tuple[bool, bool]] = field(default_factory=list)
    answers: list[bool] = field(default_factory=list)
    relevance: list[tuple[bool, float]] = field(default_factory=list)
    support: list[tuple[bool, float]] = field(default_factory=list)

    def summarize(self) -> dict[str, float]:
        """Compute the figures that the trees allow.

        These are the decision accuracy, the share of answers that greedy decoding gets right, and two ROC AUCs. All but
        the answers need targets of both kinds.
        """
        right = [wanted == decided for wanted, decided in self.decisions]
        both = len({wanted for wanted, _ in self.decisions}) == 2
        figures = {
            "decision_accuracy": _compute_share(right) if both else None,
            "answer_exact": _compute_share(self.answers),
        }
        figures |= {"isrel_auc": _compute_auc(self.relevance), "issup_auc": _compute_auc(self.support)}
        return {name: value for name, value in figures.items() if value is not None}


def _compute_share(outcomes: list[bool]) -> float | None:
    return sum(outcomes) / len(outcomes) if outcomes else None


def _compute_auc(odds: list[tuple[bool, float]]) -> float | None:
    if len({label for label, _ in odds}) < 2:
        return None
    return float(roc_auc_score(*zip(*odds, strict=True)))


def measure_held_out(student: Student, trees: Sequence[TokenTree], batch_tokens: int) -> HeldOut:
    """Evaluate a model on held-out trees.

    Args:
        student: the model.
        trees: trees with their targets.
        batch_tokens: maximum tokens of a batch, padding included.
    """
    held_out = HeldOut()
    for batch in group_trees(trees, batch_tokens, student.multiple):
        with torch.no_grad(), student.choose_precision():
            logits = compute_logits(student.model, student.load_batch(batch))
            logprobs = torch.log_softmax(logits, -1).cpu().numpy()
        ends = np.cumsum([len(tree.targets) for tree in batch])
        for tree, rows in zip(batch, np.split(logprobs, ends[:-1]), strict=True):
            read_predictions(held_out, tree, rows, student.prompts)
    return held_out


def read_predictions(held_out: HeldOut, tree: TokenTree, logprobs: Logprobs, prompts: PromptTokenizer) -> None:
    """Add a tree's predictions to the others.

    Args:
        held_out: predictions to add to.
        tree: a tree with N targets.
        logprobs: float32 [N, vocabulary], the model's log-probabilities at them.
        prompts: tokenizer with the control tokens.
    """
    ids = prompts.reflection
    retrieve, relevance, support = (ids.get_group(group) for group in (Retrieve, IsRel, IsSup))
    control = {token for group in GROUPS for token in ids.get_group(group)}
    right = logprobs.argmax(-1) == tree.targets
    answers: dict[int, bool] = {}
    for n, target in enumerate(tree.targets.tolist()):
        row = logprobs[n]
        if target in retrieve and n == 0:
            decided = retrieve[int(row[list(retrieve)].argmax())]
            held_out.decisions.append((target == ids[Retrieve.YES], decided == ids[Retrieve.YES]))
        elif target in relevance:
            odds = float(row[ids[IsRel.RELEVANT]] - row[ids[IsRel.IRRELEVANT]])
            held_out.relevance.append((target == ids[IsRel.RELEVANT], odds))
        elif target in support:
            odds = float(row[ids[IsSup.FULLY]] - row[ids[IsSup.NONE]])
            held_out.support.append((target == ids[IsSup.FULLY], odds))
        elif target not in control and target != prompts.eos and tree.weights[n] >= 1.0:
            branch = int(tree.branches[n])
            answers[branch] = answers.get(branch, True) and bool(right[n])
    held_out.answers.extend(answers.values())
