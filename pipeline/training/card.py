"""Writes the model card of a trained model: its data, its recipe and its figures on held-out rows."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from typing import Any

from huggingface_hub import ModelCardData

from pipeline.training.checkpoints import TrainingProgress
from pipeline.training.data import TeachingData
from pipeline.training.recipe import Recipe
from pipeline.training.rerank_recipe import RerankRecipe

NAMES = {
    "decision_accuracy": "decision right (retrieve or not)",
    "answer_exact": "answers written exactly",
    "isrel_auc": "IsRel AUC",
    "issup_auc": "IsSup AUC",
}


@dataclass(frozen=True)
class Training:
    """A finished training.

    Attributes:
        base: name of the base model.
        command: command line that trained the model.
        data: rows that it was trained on.
        held_out: rows that the figures are from.
        digest: SHA-256, in hex, of the rows that it was trained on.
        examined: number of held-out trees that the figures are from.
        recipe: hyperparameters.
        progress: steps, tokens and time.
        device: description of the device.
        figures: figures on held-out trees by name.
        versions: versions of the libraries by name.
    """

    base: str
    command: Sequence[str]
    data: TeachingData
    held_out: TeachingData
    digest: str
    examined: int
    recipe: Recipe
    progress: TrainingProgress
    device: str
    figures: Mapping[str, float]
    versions: Mapping[str, str]


def render_model_card(training: Training) -> str:
    """Return the card as Markdown with a YAML front matter.

    See https://huggingface.co/docs/hub/model-cards.
    """
    front = ModelCardData(base_model=training.base, tags=["self-rag", "retrieval-augmented-generation"])
    held_out = training.held_out.counts
    rows = {kind: f"{number:,}; for the figures: {held_out[kind]:,}" for kind, number in training.data.counts.items()}
    progress = training.progress
    figures = {NAMES[name]: f"{value:.3f}" for name, value in training.figures.items()}
    return f"""---
{front.to_yaml()}
---

# {training.base}, taught the reflection tokens of Self-RAG

Serve it with `selfrag annotate --model FOLDER` or `python -m jobs.annotate --model FOLDER`. Trained on {date.today()}:

```
{shlex.join(training.command)}
```

## Data

{_list_items(rows)}

SHA-256 of the rows that it was trained on: `{training.digest}`

## Recipe

{_list_items(asdict(training.recipe))}

{progress.steps:,} steps, {progress.tokens:,} tokens, {progress.seconds / 60:.1f} minutes on {training.device}
({", ".join(f"{name} {version}" for name, version in training.versions.items())}).

## Figures

On {training.examined} random trees of the held-out rows, each token predicted from the right ones before it:

{_list_items(figures)}
"""


def render_reranker_card(
    base: str,
    command: Sequence[str],
    data: TeachingData,
    questions: tuple[int, int],
    recipe: RerankRecipe,
    figures: Mapping[str, float],
) -> str:
    """Return the card of a reranker as Markdown with a YAML front matter.

    Args:
        base: name of the base model.
        command: command line that trained the reranker.
        data: rows that the questions were drawn from.
        questions: numbers of questions that it was trained on, and of held-out ones that the figures are from.
        recipe: hyperparameters.
        figures: figures on held-out questions by name.
    """
    front = ModelCardData(base_model=base, library_name="sentence-transformers", pipeline_tag="text-ranking")
    trained, examined = questions
    return f"""---
{front.to_yaml()}
---

# {base}, taught to rank passages

Use it with `--set retrieval.rerank.model=FOLDER`, or as a `CrossEncoder` of sentence-transformers. Trained on
{date.today()}:

```
{shlex.join(command)}
```

## Data

{trained:,} questions, drawn from {len(data.readings):,} readings and {len(data.pairs):,} questions with a sentence.
SHA-256 of these rows: `{data.compute_digest()}`

## Recipe

{_list_items(asdict(recipe))}

## Figures

On {examined} held-out questions:

{_list_items({name: f"{value:.3f}" for name, value in figures.items()})}
"""


def _list_items(items: Mapping[str, Any]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in items.items())
