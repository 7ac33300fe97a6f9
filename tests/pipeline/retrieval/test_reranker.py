import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder
from torch.nn import Identity
from transformers import AutoModelForSequenceClassification

from pipeline.config.sections import RerankConfig, RetrievalConfig
from pipeline.decoding.types import Passage
from pipeline.demo_models import build_demo_encoder, build_demo_reranker, hash_demo_reranker
from pipeline.retrieval.reranker import Reranker, RerankerEntry, find_reranker, order_passages, write_passage
from tests.support.rerankers import find, write_classifier, write_cross_encoder
from tests.support.students import write_base

FOUND = [find("a", "Rollo led them.", 1), find("b", "Sharks swim.", 2), find("c", "Gold is a metal.", 3)]


def configure(folder: Path, **settings: Any) -> RetrievalConfig:
    return RetrievalConfig(device="cpu", rerank=RerankConfig(model=str(folder), **settings))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cross_encoder(tmp_path_factory.mktemp("rerankers") / "tiny")


@pytest.fixture(scope="module")
def reranker(folder: Path) -> Reranker:
    return Reranker.load(configure(folder, candidates=3, batch_size=2))


def strip_weights(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    return folder


def test_best_score_comes_first_and_ties_keep_the_order_of_the_search() -> None:
    ordered = order_passages(FOUND, np.array([0.5, 2.0, 0.5], np.float32))
    assert [(one.passage.id, one.rank, one.rerank_score, one.score) for one in ordered] == [
        ("b", 1, 2.0, 0.5),
        ("a", 2, 0.5, 1.0),
        ("c", 3, 0.5, 1 / 3),
    ]


def test_scores_are_the_logits_of_the_bare_cross_encoder(folder: Path, reranker: Reranker) -> None:
    searches = [("Who led?", FOUND), ("What swims?", FOUND[:2]), ("Nothing found", [])]
    ordered = reranker.rerank(searches)
    assert [len(passages) for passages in ordered] == [3, 2, 0]
    assert reranker.rerank([]) == []
    bare = CrossEncoder(str(folder), device="cpu", activation_fn=Identity())
    for (query, found), passages in zip(searches[:2], ordered, strict=False):
        scores = bare.predict([(query, one.passage.text) for one in found])
        wanted = sorted(zip(scores, (one.passage.id for one in found), strict=True), reverse=True)
        assert [one.passage.id for one in passages] == [name for _, name in wanted]
        assert [one.rerank_score for one in passages] == pytest.approx([float(s) for s, _ in wanted], abs=1e-5)


def test_other_searches_and_the_batch_size_do_not_change_scores(folder: Path, reranker: Reranker) -> None:
    long = find("long", "word " * 900, 3)
    together = reranker.rerank([("Who led?", [*FOUND[:2], long]), ("What?", FOUND)])[0]
    alone = Reranker.load(configure(folder, batch_size=64)).rerank([("Who led?", [*FOUND[:2], long])])[0]
    assert [one.rerank_score for one in together] == pytest.approx([one.rerank_score for one in alone], abs=1e-5)


def test_title_is_read_on_a_line_before_the_text() -> None:
    assert write_passage(Passage("1", "Normans", "Rollo led.")) == "Normans\nRollo led."


@pytest.mark.parametrize(("candidates", "batch", "queries"), [(50, 64, 5), (3, 2, 2), (500, 64, 1)])
def test_call_scores_several_queries_at_once(candidates: int, batch: int, queries: int) -> None:
    entry = RerankerEntry("tiny", None, "d" * 64)
    reranker = Reranker(None, entry, RerankConfig(candidates=candidates, batch_size=batch))
    assert reranker.queries_per_call == queries


def test_identity_follows_the_files(folder: Path, reranker: Reranker) -> None:
    found, entry = find_reranker(RerankConfig(model=str(folder)))
    assert (found, entry) == (folder, reranker.entry)
    with pytest.raises(ValueError, match="its files are not those of the start of the run"):
        Reranker.load(configure(folder), digest="0" * 64)


def test_plain_classifier_with_one_label_is_a_reranker(tmp_path: Path, reranker: Reranker) -> None:
    plain = Reranker.load(configure(write_classifier(tmp_path / "plain")))
    query = [("Who led?", "Rollo led them.")]
    assert plain.score(query) == pytest.approx(reranker.score(query), abs=1e-5)


def test_other_models_are_refused(tmp_path: Path) -> None:
    models = {
        "not a cross-encoder with one score, but BertModel": build_demo_encoder(),
        "but BertForSequenceClassification with 3 labels": write_classifier(tmp_path / "three", labels=3),
        "but BertForSequenceClassification with 2 labels": write_classifier(tmp_path / "two", labels=2),
        "but BertForSequenceClassification with 4 labels;": write_cross_encoder(tmp_path / "four", labels=4),
        "but BertForSequenceClassification without weights": strip_weights(write_classifier(tmp_path / "stripped")),
        "but LlamaForCausalLM": write_base(tmp_path / "writer"),
        "no such folder": tmp_path / "missing",
        "but an unknown model": tmp_path,
    }
    for problem, folder in models.items():
        with pytest.raises(ValueError, match=f"reranker {folder}: .*{problem}"):
            find_reranker(RerankConfig(model=str(folder)))


def test_code_of_the_model_is_not_run(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "custom")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForSequenceClassification": "modeling.Mine"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="with code of its own, which is not run"):
        find_reranker(RerankConfig(model=str(folder)))


def test_damaged_weights_are_one_line(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "damaged")
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match=r"^reranker .*: cannot be loaded \([^\n]+\)$"):
        Reranker.load(configure(folder))


def test_cpus_compute_in_float32(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "half")
    AutoModelForSequenceClassification.from_pretrained(folder).bfloat16().save_pretrained(folder)
    loaded = Reranker.load(configure(folder, dtype="float16"))
    assert {weight.dtype for weight in loaded._model.parameters()} == {torch.float32}
    assert loaded.device == "cpu"


def test_tokenizer_is_part_of_the_identity(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "tiny")
    _, before = find_reranker(RerankConfig(model=str(folder)))
    (folder / "vocab.txt").write_text("other")
    assert find_reranker(RerankConfig(model=str(folder)))[1].digest != before.digest


def test_demo_reranker_has_one_digest_on_all_machines() -> None:
    folder, entry = find_reranker(RerankConfig(model="demo"))
    assert entry == RerankerEntry("demo", None, hash_demo_reranker())
    assert folder == build_demo_reranker()


def test_memory_that_does_not_suffice_is_one_line_with_a_remedy() -> None:
    class Large:
        def predict(self, pairs: list[tuple[str, str]], **_: Any) -> list[float]:
            assert len(pairs) == 16
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 9 GiB")

    reranker = Reranker(Large(), RerankerEntry("large", None, "d" * 64), RerankConfig(batch_size=16))
    with pytest.raises(
        ValueError, match=r"^reranker large: .*retrieval\.rerank\.batch_size 16 .*; lower it, or [^\n]+$"
    ):
        reranker.take_memory()


def test_damaged_configuration_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        find_reranker(RerankConfig(model=str(tmp_path)))


def test_score_that_is_not_a_number_is_an_error() -> None:
    class Overflowing:
        def predict(self, pairs: list[tuple[str, str]], **_: Any) -> list[float]:
            return [float("nan")] * len(pairs)

    reranker = Reranker(Overflowing(), RerankerEntry("half", None, "d" * 64), RerankConfig())
    with pytest.raises(
        ValueError, match=r"reranker half: a score is not a number; if retrieval\.rerank\.dtype is not float32"
    ):
        reranker.rerank([("Who led?", FOUND)])
