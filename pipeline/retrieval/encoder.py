"""Encodes text as vectors, with a model whose files are identified by a digest."""

import hashlib
import json
import re
import threading
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pipeline.config.loading import Frozen
from pipeline.config.paths import find_local_folder
from pipeline.gpus import decide_gpu_use
from pipeline.storage.location import join_lines

Vectors = npt.NDArray[np.float32]

# Files that affect the vectors, in any folder of a model. READMEs, training logs and exports to other runtimes do not.
_CONFIGURATION = (
    "modules.json",
    "config.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
# The first of these formats that a folder has is the one that is loaded.
_WEIGHTS = ("*.safetensors", "*.bin")
# Folders of modules in a model: none that begins with a dot, and so none above it.
_MODULE_PATH = re.compile(r"(\w[\w.-]*(/\w[\w.-]*)*/?)?")
# Tokenizers without a limit have one beyond this.
_UNLIMITED = 10**6
_OTHER_RUNTIMES = ["*.onnx", "*.h5", "*.ot", "*.msgpack", "onnx/*", "openvino/*"]


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
        torch_device = _choose_torch_device(device)
        folder = _find_folder(name) or _fetch(name, revision)
        import torch
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging

        logging.disable_progress_bar()
        try:
            model = SentenceTransformer(str(folder), device=torch_device, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"encoder {name}: not a sentence-transformers model ({join_lines(error)})") from None
        style = style or EncoderStyle()
        if torch_device != "cpu":
            model = model.to(getattr(torch, style.dtype))
        commit = folder.name if folder.parent.name == "snapshots" else None
        return cls(model, name, commit, _hash_encoder_folder(folder), style)

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


def hash_encoder(name: str, revision: str | None = None) -> str | None:
    """Return the digest of a model without loading it; None for a Hugging Face model that is not in the local cache.

    Args:
        name: as in :meth:`Encoder.load`.
        revision: as in :meth:`Encoder.load`.

    Raises:
        ValueError: there is no such folder, or the demo encoder cannot be downloaded.
    """
    folder = _find_folder(name)
    if folder is None:
        import huggingface_hub

        try:
            folder = Path(huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True))
        except (OSError, ValueError):
            return None
    return _hash_encoder_folder(folder)


def _find_folder(name: str) -> Path | None:
    """Return the local folder of a model; None for a name on the Hugging Face hub."""
    if name == "demo":
        from pipeline.demo_models import build_demo_encoder

        try:
            return build_demo_encoder()
        except RuntimeError as error:
            raise ValueError(f"encoder demo: {join_lines(error)}") from None
    if (folder := find_local_folder(name)) is not None:
        return folder
    if name.lower().startswith((".", "/", "~", "file:")):
        raise ValueError(f"encoder {name}: no such folder")
    return None


def _fetch(name: str, revision: str | None) -> Path:
    """Return a model's folder in the Hugging Face cache, downloading missing files; ``*.bin`` only as a fallback."""
    # Imported late, since it reads its variables on import, and those of a worker come with its arguments.
    import huggingface_hub
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    try:
        for left_out in ([*_OTHER_RUNTIMES, "*.bin"], _OTHER_RUNTIMES):
            folder = Path(huggingface_hub.snapshot_download(name, revision=revision, ignore_patterns=left_out))
            if any(folder.glob("*.safetensors")):
                break
    except (OSError, ValueError) as error:
        raise ValueError(
            f"encoder {name}: neither a local folder nor available from the Hugging Face hub ({join_lines(error)})"
        ) from None
    return folder


def _hash_encoder_folder(folder: Path) -> str:
    total = hashlib.sha256()
    for file in _list_own_files(folder):
        with file.open("rb") as content:
            inner = hashlib.file_digest(content, "sha256").hexdigest()
        total.update(f"{file.relative_to(folder).as_posix()}\n{inner}\n".encode())
    return total.hexdigest()


def _list_own_files(folder: Path) -> list[Path]:
    modules = folder / "modules.json"
    paths = [""]
    if modules.is_file():
        paths = _read_module_paths(modules)
    files: set[Path] = set()
    for part in {folder, *(folder / path for path in paths)}:
        files.update(part / name for name in _CONFIGURATION if (part / name).is_file())
        weights = (sorted(part.glob(pattern)) for pattern in _WEIGHTS)
        files.update(next(filter(None, weights), []))
    return sorted(files)


def _read_module_paths(modules: Path) -> list[str]:
    """Read the subfolders of an encoder's modules.

    Raises:
        ValueError: the file is damaged, or a path leads out of the encoder's folder.
    """
    try:
        paths = [str(module["path"]) for module in json.loads(modules.read_text())]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{modules}: not a list of modules with a path ({error!r}); download the model again"
        ) from None
    for path in paths:
        if not _MODULE_PATH.fullmatch(path):
            raise ValueError(f"{modules}: the path {path!r} is not a folder of the model; download the model again")
    return paths


def _choose_torch_device(device: str) -> str:
    import torch

    if decide_gpu_use(device) and torch.cuda.is_available():
        return "cuda"
    if device == "gpu":
        raise ValueError("device gpu: PyTorch finds no usable GPU on this machine; set device to auto or cpu")
    return "cpu"


def resolve_encoder_name(encoder: str) -> str:
    """Return the absolute path of a folder, since actors and later runs use other folders; other names unchanged."""
    folder = find_local_folder(encoder) if encoder != "demo" else None
    return encoder if folder is None else str(folder.resolve())
