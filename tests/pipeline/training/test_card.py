from dataclasses import replace

import yaml

from pipeline.training.card import Training, render_model_card
from pipeline.training.checkpoints import TrainingProgress
from pipeline.training.data import Instruction, ReadingTriple, TeachingData
from pipeline.training.recipe import Recipe

READING = ReadingTriple("q?", "", "The answer.", "answer")
TRAINING = Training(
    base="some/base",
    command=["python", "-m", "jobs.teach", "--data", "my rows.csv"],
    data=TeachingData((READING,) * 1_234, (Instruction("i", "o"),)),
    held_out=TeachingData((READING,) * 5),
    digest="abc123",
    examined=90,
    recipe=Recipe(rank=8),
    progress=TrainingProgress(steps=70, trees=900, tokens=123_456, seconds=90.0),
    device="2 CPU threads",
    figures={"decision_accuracy": 0.98765},
    versions={"torch": "2.13.0"},
)


def test_card_tells_data_recipe_and_figures() -> None:
    card = render_model_card(TRAINING)
    for line in (
        "- readings: 1,234; for the figures: 5",
        "- instructions: 1; for the figures: 0",
        "SHA-256 of the rows that it was trained on: `abc123`",
        "- rank: 8",
        "70 steps, 123,456 tokens, 1.5 minutes on 2 CPU threads",
        "(torch 2.13.0).",
        "On 90 random trees of the held-out rows, each token predicted from the right ones before it:",
        "- decision right (retrieve or not): 0.988",
        "python -m jobs.teach --data 'my rows.csv'",
    ):
        assert line in card.splitlines()
    assert "AUC" not in card
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "some/base"
    assert "self-rag" in front["tags"]


def test_card_of_a_local_base_model_keeps_its_name() -> None:
    card = render_model_card(replace(TRAINING, base="/models/mine"))
    assert "# /models/mine, taught the reflection tokens" in card
