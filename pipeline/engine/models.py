"""The configured model: its path, the identity of its files, its tokenizer and its critic."""

import hashlib
from pathlib import Path
from typing import Any

from pipeline.config.run import RunConfig
from pipeline.config.sections import ModelConfig
from pipeline.decoding.prompted_reader import PromptedCritic
from pipeline.decoding.prompts import PromptTokenizer
from pipeline.decoding.protocols import Critic
from pipeline.decoding.reflection_reader import ReflectionCritic

# Larger files are hashed only at both ends: enough to distinguish two trainings, and cheap even for 70 B parameters.
WHOLE_FILE_BYTES = 256 * 2**20
PART_BYTES = 2**20


def identify_model(model: ModelConfig, path: str) -> dict[str, Any]:
    """Return the identity of a model: digest of a local folder, or name and commit on the Hugging Face hub.

    The LoRA adapter is identified as ``lora``: by the digest of a local folder, otherwise by its name.

    Args:
        path: local folder of the model, or its name on the hub.
    """
    lora = model.lora
    if lora and Path(lora).is_dir():
        lora = hash_model_folder(Path(lora))
    if Path(path).is_dir():
        return {"digest": hash_model_folder(Path(path)), "lora": lora}
    from transformers import AutoConfig

    commit = getattr(AutoConfig.from_pretrained(path, revision=model.revision), "_commit_hash", None)
    return {"name": path, "commit": commit, "lora": lora}


def hash_model_folder(folder: Path) -> str:
    """Return the SHA-256, in hex, over names, sizes and contents of the files in a model folder.

    Hidden files and the middle of files larger than ``WHOLE_FILE_BYTES`` are skipped.
    """
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


def resolve_model_path(name: str) -> str:
    """Return the folder of the embedded model for ``demo``; other names (hub or local folder) unchanged."""
    if name != "demo":
        return name
    from pipeline.demo_models import build_demo_model

    return str(build_demo_model())


def load_tokenizer(model: ModelConfig) -> Any:
    """Load only the tokenizer of a model, which is cheap; ``model.engine.tokenizer`` takes precedence.

    Raises:
        ValueError: the tokenizer cannot be loaded.
    """
    from transformers import AutoTokenizer

    name = str(model.engine.get("tokenizer") or model.name)
    try:
        return AutoTokenizer.from_pretrained(resolve_model_path(name), revision=model.revision)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"model {name}: its tokenizer cannot be loaded: {reason}") from None


def load_critic(config: RunConfig) -> Critic:
    """Return the critic of a run, for which only the model's tokenizer is loaded.

    Raises:
        ValueError: the tokenizer cannot be loaded, or does not support this critic.
    """
    tokenizer = load_tokenizer(config.model)
    if config.decoding.critic == "prompted":
        return PromptedCritic(tokenizer, config.model.name)
    return ReflectionCritic(PromptTokenizer.of(tokenizer, config.model.name))
