"""Orders the passages of a search by a cross-encoder, which reads query and passage together."""

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from pipeline.config.sections import RerankConfig, RetrievalConfig
from pipeline.decoding.prompts import format_passage
from pipeline.decoding.types import Passage, RetrievedPassage
from pipeline.demo_models import build_demo_reranker, hash_demo_reranker
from pipeline.gpus import lock_gpus
from pipeline.retrieval.model_source import ModelSource, choose_torch_device, has_weights, hash_model_files, read_commit
from pipeline.storage.location import join_lines

RERANKERS = ModelSource("reranker", build_demo_reranker)

# Files of tokenizers and prompts that decide scores, besides those of an encoder.
TOKENIZER_FILES = ("vocab.txt", "*.model", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
# Labels of a classifier whose configuration says nothing of them: transformers writes neither number nor names then.
DEFAULT_LABELS = 2
# Tokens of the longest pairs that memory is taken for; models that read more seldom get them.
USUAL_TOKENS = 512
# Forward passes of a call: pairs are sorted by length over all of them, which saves padding.
PASSES_PER_CALL = 4


@dataclass(frozen=True)
class RerankerEntry:
    """The identity of a reranker, for the manifest of a run.

    Attributes:
        name: configured name.
        revision: commit on the Hugging Face hub; None for a folder.
        digest: SHA-256, in hex, over its configuration and weight files.
    """

    name: str
    revision: str | None
    digest: str


class Reranker:
    """A cross-encoder of sentence-transformers.

    Attributes:
        entry: identity of the model.
        candidates: passages that a search finds for it.
        batch_size: pairs of a forward pass.
    """

    def __init__(self, model: Any, entry: RerankerEntry, config: RerankConfig) -> None:
        self.entry = entry
        self.candidates = config.candidates
        self.batch_size = config.batch_size
        self._model = model
        # Tokenizers in Rust raise "Already borrowed" if two threads use one at once.
        self._lock = threading.Lock()

    @classmethod
    def load(cls, retrieval: RetrievalConfig, digest: str | None = None) -> "Reranker":
        """Load ``retrieval.rerank.model``.

        Args:
            digest: required digest of the model; any by default.

        Raises:
            ValueError: no model is set, there is no such model, it is no cross-encoder or has another digest, or a GPU
                is required and there is none.
        """
        config, torch_device = retrieval.rerank, choose_torch_device(retrieval.device)
        folder, entry = find_reranker(config)
        if digest not in (None, entry.digest):
            raise ValueError(
                f"reranker {config.model}: its files are not those of the start of the run; put the same files on all "
                "machines"
            )
        with lock_gpus():
            reranker = cls(_load_model(str(config.model), folder, torch_device, config.dtype), entry, config)
            if torch_device != "cpu":
                reranker.take_memory()
        return reranker

    @property
    def device(self) -> str:
        """PyTorch's device type of the weights: ``cpu`` or ``cuda``."""
        return str(self._model.device.type)

    def take_memory(self) -> None:
        """Score a batch of long pairs, so that PyTorch keeps its memory before the engine takes the rest.

        Raises:
            ValueError: the memory does not suffice.
        """
        import torch

        try:
            self.score([("word", "word " * USUAL_TOKENS)] * self.batch_size)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"reranker {self.entry.name}: the GPU's memory does not suffice for retrieval.rerank.batch_size "
                f"{self.batch_size} ({join_lines(error)}); lower it, or set retrieval.rerank.dtype=float16"
            ) from None

    def score(self, pairs: Sequence[tuple[str, str]]) -> npt.NDArray[np.float32]:
        """Score pairs of query and passage; thread-safe.

        A pair that is too long for the model is cut at the end of the longer part, which is the passage as a rule.

        Returns:
            Logits, float32 [len(pairs)]: without the sigmoid that some models end with, which would make very good
            passages equal.

        Raises:
            ValueError: a score is infinite or not a number.
        """
        from torch.nn import Identity

        options = {"batch_size": self.batch_size, "activation_fn": Identity(), "show_progress_bar": False}
        with self._lock:
            scores = np.asarray(self._model.predict(list(pairs), **options), np.float32)
        if not np.isfinite(scores).all():
            raise ValueError(
                f"reranker {self.entry.name}: a score is not a number; if retrieval.rerank.dtype is not float32, set it"
            )
        return scores

    @property
    def queries_per_call(self) -> int:
        """Number of queries whose passages are scored in one call."""
        return max(1, PASSES_PER_CALL * self.batch_size // self.candidates)

    def rerank(self, searches: Sequence[tuple[str, list[RetrievedPassage]]]) -> list[list[RetrievedPassage]]:
        """Order the passages of each search by their scores; equal ones stay in the order of the search.

        Args:
            searches: query and passages of each search.
        """
        pairs = [(query, write_passage(found.passage)) for query, passages in searches for found in passages]
        scores = self.score(pairs) if pairs else np.zeros(0, np.float32)
        ends = np.cumsum([len(passages) for _, passages in searches])
        parts = np.split(scores, ends)
        return [order_passages(passages, part) for (_, passages), part in zip(searches, parts[:-1], strict=True)]


def write_passage(passage: Passage) -> str:
    """Return the text of a passage as rerankers and encoders read it."""
    return format_passage(passage.title, passage.text)


def order_passages(passages: Sequence[RetrievedPassage], scores: npt.NDArray[np.float32]) -> list[RetrievedPassage]:
    """Return passages ordered by score, float32 [len(passages)], highest first, with new ranks."""
    best = np.argsort(-scores, kind="stable").tolist()
    return [
        replace(passages[place], rank=rank, rerank_score=float(scores[place])) for rank, place in enumerate(best, 1)
    ]


def find_reranker(config: RerankConfig) -> tuple[Path, RerankerEntry]:
    """Return the folder and the identity of a reranker, without loading it; one on the hub is downloaded.

    Raises:
        ValueError: no model is set, there is no such model, or it is no cross-encoder.
    """
    if config.model is None:
        raise ValueError("retrieval.rerank.model is not set")
    folder = RERANKERS.obtain(config.model, config.revision)
    _check_cross_encoder(config.model, folder)
    digest = hash_demo_reranker() if config.model == "demo" else hash_model_files(folder, TOKENIZER_FILES)
    return folder, RerankerEntry(config.model, read_commit(folder), digest)


def _check_cross_encoder(name: str, folder: Path) -> None:
    """Check that a model scores pairs; an encoder would be loaded, too, with random weights in place of a score.

    Raises:
        ValueError: it does not.
    """
    kind = _read_json(name, folder / "config_sentence_transformers.json").get("model_type")
    config = _read_json(name, folder / "config.json")
    architecture = next(iter(config.get("architectures") or ["an unknown model"]))
    classifier = architecture.endswith("ForSequenceClassification")
    labels = len(config["id2label"]) if "id2label" in config else config.get("num_labels", DEFAULT_LABELS)
    if kind != "CrossEncoder" and (kind is not None or not classifier):
        _refuse(name, kind or architecture)
    if classifier and labels != 1:
        _refuse(name, f"{architecture} with {labels} labels")
    if "auto_map" in config:
        _refuse(name, f"{architecture} with code of its own, which is not run")
    if not has_weights(folder):
        _refuse(name, f"{architecture} without weights")


def _refuse(name: str, found: str) -> NoReturn:
    raise ValueError(
        f"reranker {name}: not a cross-encoder with one score, but {found}; choose one such as "
        "cross-encoder/ms-marco-MiniLM-L6-v2"
    )


def _load_model(name: str, folder: Path, device: str, dtype: str) -> Any:
    """Load a cross-encoder; CPUs compute in float32, whatever the data type of its files.

    Raises:
        ValueError: it cannot be loaded, or has several scores.
    """
    import torch
    from safetensors import SafetensorError
    from sentence_transformers import CrossEncoder
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model = CrossEncoder(str(folder), device=device, local_files_only=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"reranker {name}: cannot be loaded ({join_lines(error)})") from None
    if model.num_labels != 1:
        _refuse(name, f"a model with {model.num_labels} labels")
    return model.to(getattr(torch, "float32" if device == "cpu" else dtype))


def _read_json(name: str, file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise ValueError(f"reranker {name}: {file} is damaged ({error}); download the model again") from None
    return content if isinstance(content, dict) else {}
