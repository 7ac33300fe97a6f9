"""What produced a row: versions of the software, and the identity of a model."""

import hashlib
from pathlib import Path
from typing import Any

from pipeline.config.run import RunConfig
from pipeline.config.sections import ModelConfig
from pipeline.decoding.prompted_reader import PromptedCritic
from pipeline.decoding.prompts import PromptTokenizer
from pipeline.decoding.protocols import Critic
from pipeline.decoding.reflection_reader import ReflectionCritic

# Of larger files, beginning and end are read: enough to tell two trainings apart, cheap enough for 70 B weights.
WHOLE_FILE_BYTES = 256 * 2**20
PART_BYTES = 2**20


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


def model_path(name: str) -> str:
    """Where a model is: ``demo`` is the embedded default's folder; other names are the hub's or a folder's own."""
    if name != "demo":
        return name
    from pipeline.demo_models import demo_model

    return str(demo_model())


def load_tokenizer(model: ModelConfig) -> Any:
    """Load a model's tokenizer alone, which is cheap.

    Raises:
        ValueError: there is no such model.
    """
    from transformers import AutoTokenizer

    name = str(model.engine.get("tokenizer") or model.name)
    try:
        return AutoTokenizer.from_pretrained(model_path(name), revision=model.revision)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"model {name}: its tokenizer cannot be loaded: {reason}") from None


def critic_of(config: RunConfig) -> Critic:
    """The run's critic, from its model's tokenizer alone.

    Raises:
        ValueError: there is no such model, or it cannot be asked in this way.
    """
    tokenizer = load_tokenizer(config.model)
    if config.decoding.critic == "prompted":
        return PromptedCritic(tokenizer, config.model.name)
    return ReflectionCritic(PromptTokenizer.of(tokenizer, config.model.name))
