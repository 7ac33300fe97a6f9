"""Finds the folders of sentence-transformers models, and identifies them by a digest of their files."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.paths import find_local_folder
from pipeline.gpus import decide_gpu_use
from pipeline.storage.location import join_lines

# Files that decide what a model computes, in any folder of it. READMEs, training logs and exports to other runtimes do
# not.
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
_OTHER_RUNTIMES = ["*.onnx", "*.h5", "*.ot", "*.msgpack", "onnx/*", "openvino/*"]


@dataclass(frozen=True)
class ModelSource:
    """Source of the models of a role: local folders, the Hugging Face hub, or the embedded ``demo``.

    Attributes:
        role: name of the role, which begins error messages.
        build_demo: returns the folder of the embedded model.
    """

    role: str
    build_demo: Callable[[], Path]

    def obtain(self, name: str, revision: str | None = None) -> Path:
        """Return the folder of a model; one on the hub is downloaded into the Hugging Face cache.

        Args:
            name: name on the Hugging Face hub, local folder, or ``demo``.
            revision: branch, tag or commit on the hub; the newest commit by default.

        Raises:
            ValueError: there is no such model, or it cannot be downloaded.
        """
        return self._find_folder(name) or self._fetch(name, revision)

    def hash_present(self, name: str, revision: str | None = None) -> str | None:
        """Return the digest of a model without loading it; None for one on the hub that is not in the local cache.

        Args:
            name: as in :meth:`obtain`.
            revision: as in :meth:`obtain`.

        Raises:
            ValueError: there is no such folder, or the embedded model cannot be downloaded.
        """
        folder = self._find_folder(name)
        if folder is None:
            import huggingface_hub

            try:
                folder = Path(huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True))
            except (OSError, ValueError):
                return None
        return hash_model_files(folder)

    def _find_folder(self, name: str) -> Path | None:
        """Return the local folder of a model; None for a name on the hub."""
        if name == "demo":
            try:
                return self.build_demo()
            except RuntimeError as error:
                raise ValueError(f"{self.role} demo: {join_lines(error)}") from None
        if (folder := find_local_folder(name)) is not None:
            return folder
        if name.lower().startswith((".", "/", "~", "file:")):
            raise ValueError(f"{self.role} {name}: no such folder")
        return None

    def _fetch(self, name: str, revision: str | None) -> Path:
        """Return a model's folder in the Hugging Face cache; missing files are downloaded, ``*.bin`` only if needed."""
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
            reason = join_lines(error)
            raise ValueError(
                f"{self.role} {name}: neither a local folder nor available from the Hugging Face hub ({reason})"
            ) from None
        return folder


def read_commit(folder: Path) -> str | None:
    """Return the commit of a folder in the Hugging Face cache; None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" else None


def hash_model_files(folder: Path, more: Sequence[str] = ()) -> str:
    """Return the SHA-256, in hex, over names and contents of a model's configuration and weight files.

    Args:
        folder: folder of the model.
        more: glob patterns of further files that decide what it computes.

    Raises:
        ValueError: the model's list of modules is damaged.
    """
    total = hashlib.sha256()
    for file in _list_own_files(folder, more):
        with file.open("rb") as content:
            inner = hashlib.file_digest(content, "sha256").hexdigest()
        total.update(f"{file.relative_to(folder).as_posix()}\n{inner}\n".encode())
    return total.hexdigest()


def has_weights(folder: Path) -> bool:
    """Whether a model's folder has weights in a format that is loaded.

    Raises:
        ValueError: the model's list of modules is damaged.
    """
    return any(file.suffix in (".safetensors", ".bin") for file in _list_own_files(folder))


def _list_own_files(folder: Path, more: Sequence[str] = ()) -> list[Path]:
    modules = folder / "modules.json"
    paths = [""]
    if modules.is_file():
        paths = _read_module_paths(modules)
    files: set[Path] = set()
    for part in {folder, *(folder / path for path in paths)}:
        files.update(part / name for name in _CONFIGURATION if (part / name).is_file())
        weights = (sorted(part.glob(pattern)) for pattern in _WEIGHTS)
        files.update(next(filter(None, weights), []))
        files.update(file for pattern in more for file in part.glob(pattern))
    return sorted(files)


def _read_module_paths(modules: Path) -> list[str]:
    """Read the subfolders of a model's modules.

    Raises:
        ValueError: the file is damaged, or a path leads out of the model's folder.
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


def choose_torch_device(device: str) -> str:
    """Return PyTorch's device for ``retrieval.device``; in Ray tasks and actors only GPUs that Ray assigned count.

    Raises:
        ValueError: ``device`` is ``gpu`` and there is no GPU.
    """
    import torch

    if decide_gpu_use(device) and torch.cuda.is_available():
        return "cuda"
    if device == "gpu":
        raise ValueError("device gpu: PyTorch finds no usable GPU on this machine; set device to auto or cpu")
    return "cpu"
