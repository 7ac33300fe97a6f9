"""The configuration of a run: frozen, and validated as a whole before anything starts; unknown keys fail."""

import os
from collections.abc import Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import Field

from pipeline.config.loading import Frozen, apply_settings, assign, fill_date, flatten, read_yaml, validate_section
from pipeline.config.paths import expand_home, find_local_folder, find_local_path
from pipeline.config.sections import (
    FREE_ENGINE_ARGUMENTS,
    NO_SAMPLE,
    Columns,
    DecodingConfig,
    Effect,
    ExecutionConfig,
    ModelConfig,
    OnFailure,
    Profile,
    PublishConfig,
    RetrievalConfig,
    SampleConfig,
    StorageConfig,
    TrackingConfig,
)

# Settings of a run that are URIs and may contain its date.
URIS = ("queries", "index", "output", "skip_annotated", "stale")


class RunConfig(Frozen):
    """One annotation run. In its URIs ``{date}`` is the date of the run, ``{date:%Y/%m/%d}`` in another format.

    Attributes:
        queries: URI of a Parquet file or of a folder of Parquet files.
        output: URI of the folder for the annotated set.
        index: URI of an index folder; not needed if every row has given passages or ``mode`` is ``never``.
        skip_annotated: URI of a folder with earlier annotated sets anywhere below it; queries that they answer are
            skipped.
        stale: URI of a finished annotated set of these queries; only rows for which the index would find other passages
            now are answered again, the others are carried over.
        task: Task profile of the rows without one.
        profiles: Task profiles by name, in addition to the built-in ones or replacing them.
    """

    queries: Annotated[str, Effect.FREE]
    output: Annotated[str, Effect.FREE]
    index: Annotated[str | None, Effect.FREE] = None
    skip_annotated: Annotated[str | None, Effect.FREE] = None
    stale: Annotated[str | None, Effect.FREE] = None
    sample: SampleConfig = NO_SAMPLE
    model: ModelConfig
    columns: Columns = Columns()
    decoding: DecodingConfig = DecodingConfig()
    task: str | None = None
    profiles: dict[str, Profile] = Field(default_factory=dict)
    retrieval: Annotated[RetrievalConfig, Effect.FREE] = RetrievalConfig()
    execution: Annotated[ExecutionConfig, Effect.FREE] = ExecutionConfig()
    storage: Annotated[StorageConfig, Effect.FREE] = StorageConfig()
    publish: Annotated[PublishConfig, Effect.FREE] = PublishConfig()
    tracking: Annotated[TrackingConfig, Effect.FREE] = TrackingConfig()
    on_failure: Annotated[OnFailure, Effect.FREE] = OnFailure()

    def to_record(self) -> dict[str, Any]:
        """Return the configuration for the manifest, as plain values without credentials and ``on_failure``."""
        exclude: dict[str, Any] = {
            "storage": {"access_key", "secret_key", "session_token", "azure_connection_string"},
            "model": {"engine": {"hf_token"}},
            "on_failure": True,
        }
        return self.model_dump(mode="json", exclude=exclude)

    def get_fixed_settings(self) -> dict[str, Any]:
        """Return the fixed keys, dotted (``decoding.threshold``), with the values that a resumed run must share.

        Queries, index, model and reranker are not among them: they are compared by content, so that they may be moved.
        Neither are keys that decide nothing: those of a reranker, a fusion or a sample that is not used.
        """
        unused: tuple[str, ...] = () if self.retrieval.rerank.model else ("retrieval.rerank.",)
        unused += () if self.retrieval.fusion == "rrf" else ("retrieval.rrf_k",)
        unused += () if self.sample.rows else ("sample.",)
        settings = {key: value for key, value in flatten(self.to_record()).items() if value != {} and is_fixed(key)}
        return {key: value for key, value in settings.items() if not key.startswith(unused)}


def is_fixed(key: str) -> bool:
    """Whether a dotted key decides the results; any name may stand for that of an entry (``profiles.NAME.metric``)."""
    section: type[Frozen] | None = RunConfig
    effect, names = Effect.FIXED, iter(key.split("."))
    for name in names:
        field = section.model_fields.get(name) if section else None
        if field is None:  # below a plain value, or in the name of an entry, which may hold dots
            break
        effect = next((mark for mark in field.metadata if isinstance(mark, Effect)), effect)
        section = find_section(field.annotation)
        if section is not None and section is not field.annotation:
            next(names, None)  # skip the name of the entry
    engine_argument = key.startswith("model.engine.") and key.removeprefix("model.engine.") in FREE_ENGINE_ARGUMENTS
    return effect is Effect.FIXED and not engine_argument


def find_section(annotation: Any) -> type[Frozen] | None:
    """Return the section that a field holds, alone or as entries of a mapping; None for a plain value."""
    kinds = (kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type))
    return next((kind for kind in kinds if issubclass(kind, Frozen)), None)


def load_config(file: str | None, settings: list[str], flags: dict[str, Any], day: date | None = None) -> RunConfig:
    """Build the configuration of a run. Settings take precedence over the file, and flags over both.

    Args:
        file: path or URI of a YAML file.
        settings: ``KEY=VALUE`` settings with dotted keys and values in YAML, such as ``decoding.threshold=0.3``.
        flags: values by dotted key; None leaves a key as it is.
        day: date that replaces ``{date}`` in URIs; today (UTC) by default.

    Raises:
        ValueError: the file cannot be read, or a key is unknown or missing, or has a wrong type or value; the message
            is one line with each such key and its problem.
    """
    tree = read_yaml(file) if file else {}
    if isinstance(tree.get("model"), str):
        tree["model"] = {"name": tree["model"]}
    apply_settings(tree, settings)
    for key, value in flags.items():
        if value is not None:
            assign(tree, key, value)
    config, day = validate_section(RunConfig, tree), day or datetime.now(UTC).date()
    table = config.publish.delta
    publish = config.publish.model_copy(update={"delta": table and fill_date(table, day)})
    uris = {name: fill_date(uri, day) for name, uri in _list_uris(config).items()}
    return config.model_copy(update={**uris, "publish": publish})


def _list_uris(config: RunConfig) -> dict[str, str]:
    """Return the URIs that are set, by key."""
    uris = {name: getattr(config, name) for name in URIS}
    return {name: uri for name, uri in uris.items() if uri}


def load_sections(file: str | None, settings: Sequence[str], allowed: Sequence[str]) -> dict[str, Any]:
    """Read some sections of a run's configuration, for commands that need no others.

    Args:
        file: path or URI of the YAML file of a run; its other sections are ignored.
        settings: ``KEY=VALUE`` settings of these sections, which take precedence over the file.
        allowed: names of the sections to read.

    Returns:
        Plain values by section, not validated; a missing section is empty.

    Raises:
        ValueError: the file cannot be read, or a setting is malformed or of another section; the message names it.
    """
    for setting in settings:
        if setting.split(".", 1)[0].strip() not in allowed:
            raise ValueError(f"--set {setting}: only {' and '.join(f'{name}.*' for name in allowed)} can be set here")
    found = read_yaml(file) if file else {}
    tree = {name: found.get(name) or {} for name in allowed}
    apply_settings(tree, settings)
    return tree


def load_storage(file: str | None, settings: Sequence[str]) -> StorageConfig:
    """Read the access to object storage from a run's YAML file and ``storage.KEY=VALUE`` settings.

    Raises:
        ValueError: the file cannot be read, or a setting is malformed, wrong or of another section; the message names
            it.
    """
    return validate_section(StorageConfig, load_sections(file, settings, ["storage"])["storage"], "storage")


def make_paths_absolute(config: RunConfig) -> RunConfig:
    """Make local paths in the configuration absolute, since Ray's workers have other working directories."""
    places = {name: _make_absolute(uri) for name, uri in _list_uris(config).items()}
    model, retrieval = config.model, config.retrieval
    model = model.model_copy(update={"name": _find_model(model.name), "lora": _find_model(model.lora)})
    rerank = retrieval.rerank.model_copy(update={"model": _find_model(retrieval.rerank.model)})
    retrieval = retrieval.model_copy(update={"rerank": rerank, "encoder": _find_model(retrieval.encoder)})
    return config.model_copy(update={**places, "model": model, "retrieval": retrieval})


def _make_absolute(uri: str) -> str:
    return str(find_local_path(uri) or uri)


def _find_model(name: str | None) -> str | None:
    """Return the absolute path of a model's folder; other names unchanged."""
    folder = find_local_folder(name) if name and name != "demo" else None
    return str(folder) if folder is not None else name


def get_cache_folder() -> Path:
    """Return the folder in which the demo models are cached: ``SELFRAG_CACHE``, or ``~/.cache/selfrag``."""
    return expand_home(os.environ.get("SELFRAG_CACHE") or "~/.cache/selfrag")
