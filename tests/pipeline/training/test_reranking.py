from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DistilBertConfig, DistilBertModel

from pipeline.demo_models import build_demo_encoder
from pipeline.training.data import Pair, ReadingTriple, TeachingData
from pipeline.training.rerank_recipe import RerankRecipe
from pipeline.training.reranking import (
    CERTAIN,
    RankingTask,
    attach_rank_adapter,
    build_dataset,
    draw_tasks,
    load_untrained,
    measure_ranking,
    merge_reranker,
    save_reranker,
    train_reranker,
)
from pipeline.training.rows import Negatives
from tests.support.rerankers import write_classifier

NAMES = [f"name{n}" for n in range(12)]
READINGS = tuple(ReadingTriple(f"Who is {name}?", "", f"Here is {name} himself.", name) for name in NAMES)
EVERYWHERE = [(row.title, row.passage) for row in READINGS]
NEGATIVES = Negatives({row.question: EVERYWHERE for row in READINGS}, EVERYWHERE)
RECIPE = RerankRecipe(passages=3, batch_questions=4, rank=4, learning_rate=0.003)


def test_each_task_has_the_right_passage_first_and_no_wrong_one_with_the_answer() -> None:
    tasks = draw_tasks(TeachingData(READINGS, pairs=(Pair("Who?", "It is name3."),)), NEGATIVES, RECIPE, 13)
    assert len({task.question for task in tasks}) == 13
    for task in tasks:
        assert len(set(task.passages)) == 3
        answer = "It is name3." if task.question == "Who?" else task.question.removeprefix("Who is ").rstrip("?")
        assert answer in task.passages[0]
        assert not any(answer in text for text in task.passages[1:])


def test_seed_decides_the_tasks_and_few_passages_yield_none() -> None:
    data = TeachingData(READINGS)
    assert draw_tasks(data, NEGATIVES, RECIPE, 30) == draw_tasks(data, NEGATIVES, RECIPE, 30)
    assert len(draw_tasks(data, NEGATIVES, RECIPE, 30)) == 30
    assert draw_tasks(TeachingData(READINGS[:1]), Negatives({}, EVERYWHERE[:2]), RECIPE, 5) == []


def test_loss_wants_all_of_the_right_passage() -> None:
    (row,) = build_dataset([RankingTask("q", ("right", "wrong", "worse"))])
    assert (row["query"], row["docs"]) == ("q", ["right", "wrong", "worse"])
    target = np.exp(row["labels"]) / np.exp(row["labels"]).sum()
    assert target == pytest.approx([1.0, 0.0, 0.0], abs=1e-12)
    assert row["labels"][0] == CERTAIN


def test_figures_by_hand() -> None:
    class ByLength:
        def predict(self, pairs: list[tuple[str, str]], **_: Any) -> list[float]:
            return [float(len(text)) for _, text in pairs]

    tasks = [
        RankingTask("first", ("longest", "a", "b")),
        RankingTask("third", ("a", "bbb", "cc")),
        RankingTask("a tie counts as lost", ("aa", "bb", "c")),
    ]
    model: Any = ByLength()
    figures = measure_ranking(model, tasks)
    assert figures["right passage first"] == pytest.approx(1 / 3)
    assert figures["mean reciprocal rank"] == pytest.approx((1 + 1 / 3 + 1 / 2) / 3)


def test_trained_adapter_makes_the_same_reranker_of_its_base(tmp_path: Path) -> None:
    base = write_classifier(tmp_path / "base")
    tasks = [RankingTask("yes?", (f"yes {n}", f"no {n}", f"maybe {n}")) for n in range(200)]
    (tmp_path / "out").mkdir()
    trained = load_untrained(str(base), RECIPE.seed)
    adapted = attach_rank_adapter(trained, RECIPE)
    train_reranker(trained, tasks, RECIPE)
    save_reranker(trained, adapted, tmp_path / "out", "tiny")
    assert measure_ranking(trained, tasks)["right passage first"] > 0.9
    merge_reranker(str(base), tmp_path / "out" / "adapter", tmp_path / "merged")
    pairs = [(task.question, text) for task in tasks[:3] for text in task.passages]
    saved, merged = (CrossEncoder(str(tmp_path / name), device="cpu").predict(pairs) for name in ("out", "merged"))
    assert saved == pytest.approx(trained.predict(pairs), abs=1e-6)
    assert merged == pytest.approx(saved, abs=0.02)  # the adapter is in half precision


def test_training_that_diverges_is_an_error(tmp_path: Path) -> None:
    model = load_untrained(str(write_classifier(tmp_path / "base")), 0)
    recipe = replace(RECIPE, learning_rate=1e30)
    attach_rank_adapter(model, recipe)
    with pytest.raises(RuntimeError, match=r"the training diverged: its loss is nan; lower --learning-rate"):
        train_reranker(model, [RankingTask("yes?", (f"yes {n}", "no", "maybe")) for n in range(40)], recipe)


def test_base_models_that_do_not_suit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="base model .*: cannot be loaded as a classifier"):
        load_untrained(str(tmp_path), 0)
    settings = {"dim": 32, "hidden_dim": 64, "n_layers": 1, "n_heads": 2, "vocab_size": 30522}
    DistilBertModel(DistilBertConfig(**settings)).save_pretrained(tmp_path / "distil")
    AutoTokenizer.from_pretrained(build_demo_encoder()).save_pretrained(tmp_path / "distil")
    model = load_untrained(str(tmp_path / "distil"), 0)
    with pytest.raises(ValueError, match="DistilBertForSequenceClassification cannot get an adapter"):
        attach_rank_adapter(model, RECIPE)


def test_half_precision_base_is_trained_in_float32(tmp_path: Path) -> None:
    base = write_classifier(tmp_path / "base")
    AutoModelForSequenceClassification.from_pretrained(base).bfloat16().save_pretrained(base)
    assert {weight.dtype for weight in load_untrained(str(base), 0).parameters()} == {torch.float32}
