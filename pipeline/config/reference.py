"""Generate the reference of a run's configuration from the models and their docstrings.

``python -m pipeline.config.reference > infra/CONFIGURATION.md``
"""

import inspect
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from pipeline.config.loading import Frozen
from pipeline.config.run import RunConfig, find_section, is_fixed

HEAD = """<!-- Made from pipeline/config: python -m pipeline.config.reference > infra/CONFIGURATION.md -->
# Configuration of a run

Set a key in the YAML file of `--config` or with `--set` (`--set decoding.threshold=0.3`). `--set` takes precedence over
the file, and flags such as `--output` take precedence over both. Unknown keys and wrong values end the command with
status 2.

Keys marked *fixed* decide the results: a run can only be resumed with the same values. This includes all arguments in
`model.engine` except those that place the engine on machines (`gpu_memory_utilization`, `kv_cache_memory_bytes`,
`max_num_batched_tokens`, `max_num_seqs`, and the parallel sizes). The content of the query set, the index, the model
and the reranker must be the same too, wherever they lie. All other keys may change from one call to the next.
"""
WORDS = {"string": "text", "boolean": "`true` or `false`", "object": "mapping", "array": "list"}
# An entry of a docstring's section "Attributes": names, and their meaning on that line and on further indented ones.
ENTRY = re.compile(r"^    (\w+(?:, \w+)*): (.+(?:\n {5,}.+)*)", re.MULTILINE)


@dataclass(frozen=True)
class Key:
    """A key of the configuration.

    Attributes:
        name: dotted name; ``NAME`` in it stands for a name that the user chooses.
        kind: type in words.
        default: default value in JSON, which is also YAML; None if the key is required.
        meaning: description in Markdown; empty if the docstring does not describe the key.
        fixed: whether a resumed run must have the same value.
    """

    name: str
    kind: str
    default: str | None
    meaning: str
    fixed: bool

    def format_row(self) -> str:
        """Format the key as a row of a Markdown table."""
        default = {None: "required", "null": ""}.get(self.default, f"`{self.default}`")
        cells = (f"`{self.name}`", self.kind, default, "fixed" if self.fixed else "", self.meaning)
        return f"| {' | '.join(cells)} |"


def describe_keys(section: type[Frozen] = RunConfig, prefix: str = "") -> Iterator[Key]:
    """Yield all keys of a section; those of the sections in it come last."""
    properties, meanings = section.model_json_schema()["properties"], parse_attributes(section)
    within: dict[str, type[Frozen]] = {}
    for name, field in section.model_fields.items():
        if inner := find_section(field.annotation):
            within[name if field.annotation is inner else f"{name}.NAME"] = inner
        if field.annotation is not inner:
            default = None if field.is_required() else json.dumps(field.get_default(call_default_factory=True))
            kind, key = describe_type(properties[name]), prefix + name
            yield Key(key, kind, default, meanings.get(name, ""), is_fixed(key))
    for name, inner in within.items():
        yield from describe_keys(inner, f"{prefix}{name}.")


def parse_attributes(section: type[Frozen]) -> dict[str, str]:
    """Return the descriptions of a section's keys from its docstring, in Markdown."""
    entries = ENTRY.findall((inspect.getdoc(section) or "").partition("Attributes:\n")[2])
    return {name: to_markdown(meaning) for names, meaning in entries for name in names.split(", ")}


def to_markdown(text: str) -> str:
    """Convert the text of a docstring to one line of Markdown."""
    return " ".join(text.split()).replace("``", "`")


def describe_type(schema: dict[str, Any]) -> str:
    """Describe a type in words, from its JSON schema."""
    schema = next((one for one in schema.get("anyOf", []) if one["type"] != "null"), schema)
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    if "items" in schema:
        return f"list of {describe_type(schema['items'])}s"
    secret = "secret " if schema.get("format") == "password" else ""
    bounds = {"≥": schema.get("minimum"), ">": schema.get("exclusiveMinimum"), "≤": schema.get("maximum")}
    limits = [f"{sign} {bound:g}" for sign, bound in bounds.items() if bound is not None]
    return f"{secret}{WORDS.get(schema['type'], schema['type'])} {', '.join(limits)}".rstrip()


def find_section_name(key: Key) -> str:
    """Return the name of the section that a key belongs to; empty for a key of the run itself."""
    section, dot, _ = key.name.partition(".")
    return section if dot else ""


def format_reference() -> str:
    """Return the whole reference page, in Markdown."""
    parts = [HEAD]
    for name, group in groupby(describe_keys(), find_section_name):
        section = find_section(RunConfig.model_fields[name].annotation) if name else RunConfig
        about = to_markdown((inspect.getdoc(section) or "").partition("Attributes:\n")[0])
        table = ["| key | type | default | | meaning |", "| --- | --- | --- | --- | --- |"]
        rows = [key.format_row() for key in group]
        parts.append("\n".join([f"## {name or 'The run'}\n\n{about}\n", *table, *rows, ""]))
    return "\n".join(parts)


if __name__ == "__main__":
    sys.stdout.write(format_reference())
