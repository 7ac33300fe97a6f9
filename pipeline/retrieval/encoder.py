"""Encodes text as vectors, with a model whose files are identified by a digest."""

import threading
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pipeline.config.loading import Frozen
from pipeline.config.paths import find_local_folder
from pipeline.demo_models import build_demo_encoder
from pipeline.retrieval.model_source import ModelSource, choose_torch_device, hash_model_files, read_commit
from pipeline.storage.location import join_lines

Vectors = npt.NDArray[np.float32]

# Tokenizers without a limit have one beyond this.
_UNLIMITED = 10**6

ENCODERS = ModelSource("encoder", build_demo_encoder)


class EncoderStyle(Frozen):
    """The usage of an encoder, as recommended by its model card.

    Attributes:
        query_prefix, passage_prefix: strings put before every query or passage, such as E5's ``query: `` and
            ``passage: ``; if empty, the prompts in the model's own configuration apply.
        normalised: scale vectors to unit length, so that inner products are cosines; false for Contriever.
        dtype: data type of the weights on a GPU; CPUs compute in float32.
    """

    query_prefix: str = ""
    passage_prefix: str = ""
    normalised: bool = True
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"


class Encoder:
    """A sentence-transformers model; plain transformers get mean pooling.

    Attributes:
        name: configured name: on the Hugging Face hub, a local folder, or ``demo``.
        revision: commit on the Hugging Face hub; None for a folder.
        digest: SHA-256, in hex, over names and contents of the model's configuration and weight files.
        dimension: number of dimensions of the vectors.
        max_tokens: number of tokens that the model reads of a text, special ones included; None is no limit.
        style: usage of the model.
    """

    def __init__(self, model: Any, name: str, revision: str | None, digest: str, style: EncoderStyle) -> None:
        self.name = name
        self.revision = revision
        self.digest = digest
        self.dimension = int(model.get_embedding_dimension())
        limit = model.max_seq_length
        self.max_tokens = None if limit is None or limit >= _UNLIMITED else int(limit)
        self.style = style
        self._model = model
        # Tokenizers in Rust raise "Already borrowed" if two threads use one at once.
        self._lock = threading.Lock()

    @classmethod
    def load(
        cls, name: str, device: str = "auto", revision: str | None = None, style: EncoderStyle | None = None
    ) -> "Encoder":
        """Load a model.

        Args:
            name: name on the Hugging Face hub, local folder, or ``demo``.
            device: ``cpu``, ``gpu``, or ``auto``, which uses a GPU if there is one. In Ray tasks and actors only GPUs
                that Ray assigned count.
            revision: branch, tag or commit on the Hugging Face hub; the newest commit by default.
            style: usage of the model; by default vectors of unit length, without prefixes.

        Raises:
            ValueError: there is no such model, or ``device`` is ``gpu`` and there is no GPU.
        """
        torch_device = choose_torch_device(device)
        folder = ENCODERS.obtain(name, revision)
        import torch
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging

        logging.disable_progress_bar()
        try:
            model = SentenceTransformer(str(folder), device=torch_device, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"encoder {name}: not a sentence-transformers model ({join_lines(error)})") from None
        style = style or EncoderStyle()
        model = model.to(getattr(torch, "float32" if torch_device == "cpu" else style.dtype))
        return cls(model, name, read_commit(folder), hash_model_files(folder), style)

    @property
    def device(self) -> str:
        """PyTorch's device type of the weights: ``cpu`` or ``cuda``."""
        return str(self._model.device.type)

    def encode(self, texts: list[str], batch_size: int = 32) -> Vectors:
        """Encode passages as float32 [len(texts), dimension]; thread-safe."""
        return self._encode(self._model.encode_document, texts, batch_size, self.style.passage_prefix)

    def count_truncated(self, texts: list[str]) -> int:
        """Count the passages that have more tokens than the model reads of a text; thread-safe."""
        if self.max_tokens is None or not texts:
            return 0
        prompted = [self._passage_prompt + text for text in texts]
        with self._lock:
            ids = self._model.tokenizer(prompted, truncation=False, verbose=False)["input_ids"]
        return sum(len(found) > self.max_tokens for found in ids)

    @property
    def _passage_prompt(self) -> str:
        """The text before every passage: the style's, or that of the model, as ``encode_document`` finds it."""
        named = (self._model.prompts.get(name) for name in ("document", "passage", "corpus"))
        return self.style.passage_prefix or next((prompt for prompt in named if prompt is not None), "")

    def encode_queries(self, texts: list[str], batch_size: int = 32) -> Vectors:
        """Encode queries as float32 [len(texts), dimension], with the prefix or prompt of queries; thread-safe."""
        return self._encode(self._model.encode_query, texts, batch_size, self.style.query_prefix)

    def _encode(self, encode: Any, texts: list[str], batch_size: int, prefix: str) -> Vectors:
        if not texts:
            return np.zeros((0, self.dimension), np.float32)
        options = {"normalize_embeddings": self.style.normalised, "prompt": prefix or None}
        with self._lock:
            vectors = encode(texts, batch_size=batch_size, show_progress_bar=False, **options)
        return np.ascontiguousarray(vectors, dtype=np.float32)


def resolve_encoder_name(encoder: str) -> str:
    """Return the absolute path of a folder, since actors and later runs use other folders; other names unchanged."""
    folder = find_local_folder(encoder) if encoder != "demo" else None
    return encoder if folder is None else str(folder.resolve())
