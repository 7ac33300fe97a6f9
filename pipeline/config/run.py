"""The configuration of a run: frozen, validated whole before anything starts; unknown keys fail."""

import os
from collections.abc import Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from pydantic import Field

from pipeline.config.loading import Frozen, apply_settings, assign, dated, flatten, read_yaml, validated
from pipeline.config.sections import (
    Columns,
    DecodingConfig,
    ExecutionConfig,
    ModelConfig,
    OnFailure,
    Profile,
    RetrievalConfig,
    StorageConfig,
)

# What a model is called, and how its engine uses machines: neither changes an answer beyond rounding.
OF_THE_MODEL = (
    "model.name",
    "model.revision",
    "model.lora",
    *(f"model.engine.{kind}_parallel_size" for kind in ("data", "pipeline", "prefill_context", "tensor")),
    *(f"model.engine.{memory}" for memory in ("gpu_memory_utilization", "kv_cache_memory_bytes")),
    *(f"model.engine.max_num_{limit}" for limit in ("batched_tokens", "seqs")),
)
# Settings of a run that are URIs, and may hold its day.
URIS = ("queries", "index", "output", "skip_annotated")


class RunConfig(Frozen):
    """One annotation run. In its URIs ``{date}`` is the run's day, ``{date:%Y/%m/%d}`` the same in another form.

    Attributes:
        queries: URI of a Parquet file or of a folder of them.
        output: URI of the folder for the annotated set.
        index: URI of an index folder; not needed where every row has given passages or ``mode`` is ``never``.
        skip_annotated: URI of a folder with earlier annotated sets somewhere below it; queries whose ids they
            answer are left out.
        task: profile of the rows that name none.
        profiles: task profiles by name, beside the built-in ones or in their place.
    """

    queries: str
    output: str
    index: str | None = None
    skip_annotated: str | None = None
    model: ModelConfig
    columns: Columns = Columns()
    decoding: DecodingConfig = DecodingConfig()
    task: str | None = None
    profiles: dict[str, Profile] = Field(default_factory=dict)
    retrieval: RetrievalConfig = RetrievalConfig()
    execution: ExecutionConfig = ExecutionConfig()
    storage: StorageConfig = StorageConfig()
    on_failure: OnFailure = OnFailure()

    def recorded(self) -> dict[str, Any]:
        """The configuration for the manifest: plain values, no credentials."""
        exclude: dict[str, Any] = {
            "storage": {"access_key", "secret_key", "session_token"},
            "model": {"engine": {"hf_token"}},
            "on_failure": True,
        }
        return self.model_dump(mode="json", exclude=exclude)

    def decisive(self) -> dict[str, Any]:
        """The keys that decide the results, flat (``decoding.threshold``): a resumed run must have the same.

        Where the job runs, how storage is reached and how the engine shares its memory may change; ``unit_rows`` may
        not, since it cuts the work into output files. Queries, index and model are compared by what they are, wherever
        they lie.
        """
        flat = flatten(self.recorded())
        places = ("queries", "index", "output", "skip_annotated", "retrieval.", "execution.", "storage.")
        elsewhere = (*places, *OF_THE_MODEL)
        kept = {key: value for key, value in flat.items() if value != {} and not key.startswith(elsewhere)}
        decisive = ("retrieval.encoder", "retrieval.search", "retrieval.float16", "execution.unit_rows")
        return {**kept, **{key: flat[key] for key in decisive}}


def load_config(file: str | None, settings: list[str], flags: dict[str, Any], day: date | None = None) -> RunConfig:
    """Build the configuration: the file, then ``KEY=VALUE`` settings, then flags that are not None.

    Args:
        settings: dotted keys with values in YAML, such as ``decoding.threshold=0.3``.
        flags: dotted keys.
        day: what ``{date}`` in URIs stands for; today (UTC) by default.

    Raises:
        ValueError: unknown key, wrong type or value; one line that names the key and says what is wrong.
    """
    tree = read_yaml(file) if file else {}
    if isinstance(tree.get("model"), str):
        tree["model"] = {"name": tree["model"]}
    apply_settings(tree, settings)
    for key, value in flags.items():
        if value is not None:
            assign(tree, key, value)
    config, day = validated(RunConfig, tree), day or datetime.now(UTC).date()
    return config.model_copy(
        update={name: dated(uri, day) for name in URIS if (uri := getattr(config, name)) is not None}
    )


def load_sections(file: str | None, settings: Sequence[str], allowed: Sequence[str]) -> dict[str, Any]:
    """Some sections of a run's configuration, for commands that need no more: as plain values, by section.

    Args:
        file: YAML file of a whole run; its other sections do not count.
        allowed: sections that the settings may be of.

    Raises:
        ValueError: a setting is of another section or wrong; one line that names it.
    """
    for setting in settings:
        if setting.split(".", 1)[0].strip() not in allowed:
            raise ValueError(f"--set {setting}: here only {' and '.join(f'{name}.*' for name in allowed)} can be set")
    found = read_yaml(file) if file else {}
    tree = {name: found.get(name) or {} for name in allowed}
    apply_settings(tree, settings)
    return tree


def load_storage(file: str | None, settings: Sequence[str]) -> StorageConfig:
    """Access to object storage from a run's YAML file and ``storage.KEY=VALUE`` settings.

    Raises:
        ValueError: a setting is of another section or wrong; one line that names it.
    """
    return validated(StorageConfig, load_sections(file, settings, ["storage"])["storage"], "storage")


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The same run with local paths in full: Ray's workers have working folders of their own."""
    places = {name: _absolute(uri) for name in URIS if (uri := getattr(config, name))}
    model = config.model
    folders = {
        name: _absolute(path) for name in ("name", "lora") if (path := getattr(model, name)) and _is_folder(path)
    }
    return config.model_copy(update={**places, "model": model.model_copy(update=folders)})


def _absolute(uri: str) -> str:
    return uri if "://" in uri else str(Path(uri).expanduser().absolute())


def _is_folder(name: str) -> bool:
    return name != "demo" and Path(name).expanduser().is_dir()


def cache_folder() -> Path:
    """The folder for the embedded default: ``SELFRAG_CACHE``, or ``~/.cache/selfrag``."""
    return Path(os.environ.get("SELFRAG_CACHE", "~/.cache/selfrag")).expanduser()
