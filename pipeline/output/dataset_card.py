"""Write the dataset card of an annotated set: its origin, the meanings of its columns, and how to load it.

The front matter follows https://huggingface.co/docs/hub/datasets-manual-configuration: ``datasets.load_dataset`` on the
folder, or on its copy on the hub, returns the answers; the failed rows are a second configuration.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import pyarrow as pa

from pipeline.output.folder import OutputFolder
from pipeline.output.schema import MEANINGS
from pipeline.storage.parquet import read_footer

# Hexadecimal digits to which digests are shortened.
SHOWN = 12
SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B")


@dataclass(frozen=True)
class FinishedSet:
    """A finished annotated set, as its manifest and files describe it.

    Attributes:
        manifest: content of the manifest.
        schemas: schemas of the configurations ``data`` and, if a row failed, ``errors``.
    """

    manifest: Mapping[str, Any]
    schemas: Mapping[str, pa.Schema]

    @classmethod
    def of(cls, folder: OutputFolder) -> "FinishedSet":
        """Read the manifest and the schemas of a folder.

        Raises:
            ValueError: the folder holds no finished set.
            StorageError: the storage cannot be read.
        """
        manifest = folder.read_manifest()
        if manifest is None or not folder.is_finished():
            raise ValueError(f"{folder.location.uri}: not a finished annotated set; run jobs.annotate to completion")
        schemas = {}
        for part in ("data", "errors"):
            if files := (folder.location / part).list_files(".parquet"):
                schemas[part] = read_footer(files[0]).schema.to_arrow_schema()
        return cls(manifest, schemas)

    @property
    def answered(self) -> int:
        """Number of rows in ``data``."""
        return int(self.manifest["counts"]["rows"] - self.manifest["counts"]["errors"])


def render_card(found: FinishedSet, title: str, licence: str | None) -> str:
    """Return the card as Markdown with a YAML front matter.

    Args:
        found: the annotated set.
        title: name of the set, on the hub if it is published there.
        licence: identifier from https://huggingface.co/docs/hub/repositories-licenses.
    """
    parts = [
        f"---\n{_render_front_matter(found, title, licence)}\n---",
        f"# {title}",
        f"{found.answered:,} queries, answered with evidence and critique by "
        "[Self-RAG](https://arxiv.org/abs/2310.11511) decoding (selfrag-batch).",
        _render_example(found, title),
        "## Provenance",
        _render_table(_describe_origin(found.manifest)),
        f"Settings: {_format_settings(found.manifest)}. Task-specific and other settings are in `_manifest.json`.",
        "## Columns",
        *(f"`{part}`:\n\n{render_columns(schema)}" for part, schema in found.schemas.items()),
        "## Caveats",
        _render_caveats(found, licence),
    ]
    return "\n\n".join(parts) + "\n"


def _render_front_matter(found: FinishedSet, title: str, licence: str | None) -> str:
    from datasets import DatasetInfo
    from datasets.info import DatasetInfosDict
    from huggingface_hub import DatasetCardData

    configs = [{"config_name": part, "data_files": f"{part}/*.parquet"} for part in found.schemas]
    data = DatasetCardData(
        license=licence,
        pretty_name=title,
        size_categories=[_choose_size(found.answered)],
        task_categories=["question-answering"],
        tags=["self-rag", "retrieval-augmented-generation"],
        configs=[{**configs[0], "default": True}, *configs[1:]],
    )
    features = {part: DatasetInfo(features=_convert_schema(schema)) for part, schema in found.schemas.items()}
    DatasetInfosDict(features).to_dataset_card_data(data)
    return str(data.to_yaml())


def _convert_schema(schema: pa.Schema) -> Any:
    """Convert a schema to ``datasets.Features``.

    Raises:
        ValueError: ``datasets`` has no such type, and could not load the set; names the column.
    """
    from datasets import Features
    from datasets.features.features import generate_from_arrow_type

    for field in schema:
        try:
            generate_from_arrow_type(field.type)
        except ValueError:
            raise ValueError(
                f"column {field.name!r} is {field.type}, which the library datasets cannot load; leave it out of the "
                "query set, or convert it"
            ) from None
    return Features.from_arrow_schema(schema.remove_metadata())


def _choose_size(rows: int) -> str:
    return SIZES[min(max(len(str(rows)) - 3, 0), len(SIZES) - 1)]


def _render_example(found: FinishedSet, title: str) -> str:
    lines = [f'answers = datasets.load_dataset("{title}", split="train")']
    if "errors" in found.schemas:
        lines.append(f'failed = datasets.load_dataset("{title}", "errors", split="train")')
    return "\n".join(["```python", "import datasets", "", *lines, "```"])


def _describe_origin(manifest: Mapping[str, Any]) -> dict[str, str]:
    configuration, counts = manifest["configuration"], manifest["counts"]
    model, index, encoder = (manifest.get(part) or {} for part in ("model", "index", "encoder"))
    adapter = configuration["model"].get("lora")
    answered = counts["rows"] - counts["errors"]
    outcome = f"{answered:,} answered, {counts['errors']:,} failed, {counts['retrieved']:,} with a passage"
    versions = ", ".join(f"{name} {number}" for name, number in manifest.get("versions", {}).items())
    lines = {
        "model": _format_identity(configuration["model"]["name"], model.get("commit"), model.get("digest")),
        "adapter": _format_identity(adapter, None, model.get("lora")) if adapter else None,
        "index": index and _format_identity(f"{index['passages']:,} passages", None, index["digest"]),
        "encoder": encoder and _format_identity(encoder["name"], encoder["revision"], encoder["digest"]),
        "reranker": _format_reranker(manifest),
        "queries": _format_queries(manifest),
        "tasks": _format_tasks(manifest["tasks"]),
        "outcome": outcome,
        "carried over": _format_carried(manifest),
        "versions": versions,
        "finished": format_end_time(manifest),
    }
    return {name: text for name, text in lines.items() if text}


def _format_queries(manifest: Mapping[str, Any]) -> str:
    rows, population = f"{manifest['counts']['rows']:,}", manifest.get("population")
    digest = (manifest.get("queries") or {}).get("digest")
    return _format_identity(
        f"a sample of {rows} of {population:,} rows" if population else f"{rows} rows", None, digest
    )


def _format_reranker(manifest: Mapping[str, Any]) -> str | None:
    if not manifest.get("reranker"):
        return None
    rerank = manifest["configuration"]["retrieval"]["rerank"]
    return _format_identity(rerank["model"], rerank["revision"], manifest["reranker"]["digest"])


def _format_carried(manifest: Mapping[str, Any]) -> str | None:
    carried = manifest["counts"].get("carried")
    return (
        _format_identity(f"{carried:,} answers of an earlier run", None, manifest["stale"]["run"]) if carried else None
    )


def _format_tasks(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    lines = []
    for name, task in tasks.items():
        label = _format_code(name) if name else "none"
        lines.append(f"{label} {task['rows']:,}")
    return ", ".join(lines)


def format_end_time(manifest: Mapping[str, Any]) -> str:
    """Return the run's end time as the card shows it, which identifies the run that a card describes."""
    return str(manifest.get("finished", ""))[:19]


def _format_identity(name: str, revision: str | None, digest: str | None) -> str:
    identity = []
    if revision:
        identity.append(f"revision {revision}")
    if digest:
        identity.append(f"digest {digest[:SHOWN]}")
    return f"{name} ({', '.join(identity)})" if identity else name


def _format_settings(manifest: Mapping[str, Any]) -> str:
    shown = ("decoding.", "retrieval.", "rescored")
    settings = {key: value for key, value in manifest["settings"].items() if key.startswith(shown)}
    return ", ".join(f"`{key}={value}`" for key, value in settings.items() if value not in (None, ""))


def render_columns(schema: pa.Schema) -> str:
    """Return a table of the meanings of columns; the columns of the query set share one line."""
    known = set(chain.from_iterable(MEANINGS))
    own = [name for name in schema.names if name not in known]
    rows = {_join_names(own): "unchanged from the query set"} if own else {}
    for names, meaning in MEANINGS.items():
        if present := [name for name in names if name in schema.names]:
            rows[_join_names(present)] = meaning
    return _render_table(rows)


def _join_names(names: list[str]) -> str:
    return ", ".join(_format_code(name) for name in names)


def _format_code(name: str) -> str:
    """Format a name from the user's data as code, so that nothing in it is read as Markdown."""
    return f"`{' '.join(name.replace('`', chr(39)).split())}`"


def _render_table(rows: Mapping[str, str]) -> str:
    lines = (f"| {_escape_cell(name)} | {_escape_cell(meaning)} |" for name, meaning in rows.items())
    return "\n".join(["| | |", "| --- | --- |", *lines])


def _escape_cell(text: str) -> str:
    return text.replace("|", "\\|")


def _render_caveats(found: FinishedSet, licence: str | None) -> str:
    counts = found.manifest["counts"]
    error_types = ", ".join(f"{name} {count:,}" for name, count in counts.get("error_types", {}).items())
    failed = f" ({error_types})" if error_types else ""
    unlicensed = "" if licence else " This card does not state a license."
    caveats = [
        "A language model generated the answers; they are not verified. The scores are the model's own probabilities.",
        "Passages are quoted from the searched corpus and remain under its license; the licenses of the query set and "
        f"the model may also apply.{unlicensed}",
        f"{counts['errors']:,} rows failed and have no answer{failed}.",
        "Seconds in `usage` depend on the machines and on the rows that ran concurrently.",
    ]
    return "\n".join(f"- {caveat}" for caveat in caveats)
