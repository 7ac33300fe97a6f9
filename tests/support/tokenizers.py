"""Tokenizers of the three kinds, as folders: sentencepiece as Llama 2, byte-level BPE and WordPiece."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.sections import ModelConfig
from pipeline.decoding.reflection import CONTROL_TOKENS
from pipeline.demo_models import build_demo_base_model, build_demo_encoder
from pipeline.engine.models import load_tokenizer

LLAMA = {
    "tokenizer_class": "LlamaTokenizer",
    "add_bos_token": True,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
}
# A chat template of Llama 2's kind, with and without its own beginning of sequence.
INST = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ 'BOS[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' </s>' }}{% endif %}{% endfor %}"
)
CHAT = {"with <s>": INST.replace("BOS", "<s>"), "without <s>": INST.replace("BOS", "")}


def write_llama(folder: Path, **settings: Any) -> Path:
    """Write the tokenizer of a model of Llama 2's kind: 32,000 pieces, a padding token; a setting of None is left out.

    Its pieces are those of Mistral's first model, which the package mistral-common, required by vLLM, brings along.
    """
    package = find_spec("mistral_common")
    pieces = Path(str(package and package.origin)).parent / "data" / "tokenizer.model.v1"
    if not pieces.exists():
        pytest.skip("the package mistral-common has no sentencepiece model")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(pieces, folder / "tokenizer.model")
    config = {key: value for key, value in (LLAMA | settings).items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def add_control_tokens(folder: Path, first: int = 32000) -> Path:
    """Add the control tokens to a tokenizer's folder, as the files of the released models do."""
    ids = {token: first + n for n, token in enumerate([*CONTROL_TOKENS, "<pad>"])}
    (folder / "added_tokens.json").write_text(json.dumps(ids))
    return folder


def load_kind(kind: str, folder: Path) -> Any:
    """Load a tokenizer of a kind: ``byte-level``, ``wordpiece``, or Llama's with that setting of ``legacy``."""
    folders = {"byte-level": build_demo_base_model, "wordpiece": build_demo_encoder}
    if kind in folders:
        return load_folder(folders[kind]())
    return load_folder(write_llama(folder, legacy=kind == "legacy"))


def load_folder(folder: Path) -> Any:
    """Load the tokenizer in a folder, as a run does."""
    return load_tokenizer(ModelConfig(name=str(folder)))
