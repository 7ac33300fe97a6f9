"""The configured model: its path, the identity of its files, its tokenizer and its critic."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config.paths import find_local_folder
from pipeline.config.run import RunConfig
from pipeline.config.sections import ModelConfig
from pipeline.decoding.prompted_reader import PromptedCritic
from pipeline.decoding.prompts import PromptTokenizer
from pipeline.decoding.protocols import Critic
from pipeline.decoding.reflection import CONTROL_TOKENS
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
    """Return the local folder of a model, of the embedded one for ``demo``; a name on the hub unchanged."""
    if name != "demo":
        return str(find_local_folder(name) or name)
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
        tokenizer = AutoTokenizer.from_pretrained(resolve_model_path(name), revision=model.revision)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"model {name}: its tokenizer cannot be loaded: {reason}") from None
    restore_beginning(tokenizer)
    mark_control_tokens(tokenizer)
    return tokenizer


def restore_beginning(tokenizer: Any) -> None:
    """Let a Llama tokenizer add ``<s>`` unless its configuration says otherwise.

    ``add_bos_token`` is documented to be true by default, but transformers 5 takes a missing key as false when it
    builds the tokenizer from ``tokenizer.model``.
    """
    settings: Mapping[str, Any] = getattr(tokenizer, "init_kwargs", {})
    built = type(tokenizer).__name__ == "LlamaTokenizer" and settings.get("vocab_file")
    if built and settings.get("add_bos_token") is None:
        tokenizer.add_bos_token = True


def mark_control_tokens(tokenizer: Any) -> None:
    """Make the control tokens of a tokenizer special: untrusted text is searched for added tokens that are not."""
    vocabulary, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    for token in filter(vocabulary.__contains__, CONTROL_TOKENS):
        tokenizer.add_tokens([added.get(vocabulary[token], token)], special_tokens=True)


def load_critic(config: RunConfig) -> Critic:
    """Return the critic of a run, for which only the model's tokenizer is loaded.

    Raises:
        ValueError: the tokenizer cannot be loaded, has no end-of-sequence token, or does not support this critic.
    """
    tokenizer = load_tokenizer(config.model)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"model {config.model.name}: its tokenizer has no end-of-sequence token; set its eos_token")
    if config.decoding.critic == "prompted":
        return PromptedCritic(tokenizer, config.model.name)
    return ReflectionCritic(PromptTokenizer.of(tokenizer, config.model.name))
