"""Read configuration as plain values, from YAML files and settings with dotted keys, and validate it as models."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from difflib import get_close_matches
from typing import Any, TypeVar

import smart_open
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.config.paths import find_local_path

_DATE = re.compile(r"\{date(?::([^{}]+))?\}")


class Frozen(BaseModel):
    """Base of the models of a configuration or manifest: immutable, and unknown keys fail."""

    model_config = ConfigDict(frozen=True, extra="forbid")


Section = TypeVar("Section", bound=Frozen)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dictionaries into one with dotted keys; empty dictionaries stay values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def find_differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the keys whose values differ, sorted; a missing value is None."""
    return sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))


def assign(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in nested dictionaries.

    Raises:
        ValueError: a parent of the key is a value, not a section.
    """
    *parents, last = key.split(".")
    for parent in parents:
        child = tree.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ValueError(f"{key}: {parent} is a value ({child!r}), not a section")
        tree = child
    tree[last] = value


def read_yaml(uri: str) -> dict[str, Any]:
    """Read a YAML mapping from a path or any URI that smart_open supports; an empty file is an empty mapping.

    Raises:
        ValueError: the file cannot be read, is not YAML, or is not a mapping; the message names the file.
    """
    try:
        with smart_open.open(find_local_path(uri) or uri, encoding="utf-8") as file:
            tree = yaml.safe_load(file)
    except (OSError, yaml.YAMLError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise ValueError(f"configuration {uri}: {' '.join(reason.split())}") from None
    except (ImportError, NotImplementedError):
        raise ValueError(
            f"configuration {uri}: a run file is read from a disk, s3:// or https://; copy it there"
        ) from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ValueError(f"configuration {uri}: expected keys and values, found {type(tree).__name__}")
    return tree


def hash_tree(tree: Any) -> str:
    """Return a digest of settings: 12 hexadecimal digits; comments and the order of keys do not count."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]


def fill_date(uri: str, day: date) -> str:
    """Replace ``{date}`` in a URI by a day such as ``2026-01-31``; ``{date:%Y/%m/%d}`` uses another format."""
    return _DATE.sub(lambda found: day.strftime(found[1] or "%Y-%m-%d"), uri)


def apply_settings(tree: dict[str, Any], settings: Sequence[str]) -> None:
    """Set ``KEY=VALUE`` settings, with dotted keys and values in YAML, in nested dictionaries.

    Raises:
        ValueError: a setting has no value, its value is not YAML, or a parent of its key is a value.
    """
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"--set {key}: expected KEY=VALUE, such as decoding.threshold=0.3")
        try:
            assign(tree, key.strip(), yaml.safe_load(value))
        except yaml.YAMLError:
            raise ValueError(f"--set {key}: the value is not YAML; put it in quotes") from None  # it may be a secret


def parse_search(search: str) -> dict[str, float]:
    """Parse FAISS search parameters such as ``nprobe=16,efSearch=64``.

    Raises:
        ValueError: the string does not have this form, or a number is not positive and finite.
    """
    parameters: dict[str, float] = {}
    for item in search.split(","):
        if not item.strip():
            continue
        key, _, value = item.partition("=")
        name = key.strip()
        try:
            parameters[name] = float(value)
        except ValueError:
            raise ValueError("expected NAME=NUMBER,… such as nprobe=16") from None
        if not 0 < parameters[name] < float("inf"):
            raise ValueError(f"{name} must be above 0")
    return parameters


def validate_section(section: type[Section], tree: dict[str, Any], name: str = "") -> Section:
    """Build a section of the configuration from plain values.

    Args:
        section: model of the section.
        tree: values by key.
        name: name of the section, for the error message.

    Raises:
        ValueError: a key is unknown or missing, or has a wrong type or value; the message is one line with each such
            key and its problem.
    """
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        known = list(iterate_keys(section, f"{name}." if name else ""))
        raise ValueError("; ".join(_describe_problem(dict(e), name, known) for e in error.errors())) from None


def iterate_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of a section and of the sections in it."""
    for name, entry in section.model_fields.items():
        yield prefix + name
        if isinstance(entry.annotation, type) and issubclass(entry.annotation, BaseModel):
            yield from iterate_keys(entry.annotation, f"{prefix}{name}.")


def suggest_key(key: str, known: Sequence[str]) -> str | None:
    """Suggest a key for a misspelt one: a similar key of its section, or one of the same name in another section."""
    section, _, name = key.rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == section}
    close = get_close_matches(name, siblings, n=1, cutoff=0.75)
    if close:
        return siblings[close[0]]
    return next((k for k in known if k.endswith(f".{name}")), None)


def _describe_problem(error: dict[str, Any], section: str, known: Sequence[str]) -> str:
    parts = [str(part) for part in error["loc"]]
    key = ".".join([section, *parts] if section else parts)
    if error["type"] == "extra_forbidden":
        meant = suggest_key(key, known)
        hint = f"; did you mean {meant}?" if meant else ""
        return f"unknown configuration key {key}{hint}"
    if error["type"] == "missing":
        flag = {"model": "--model", "model.name": "--model"}.get(key, f"--{key}")
        return f"missing configuration key {key} (flag {flag})"
    found = "" if key.startswith(("storage", "on_failure")) else f", found {error['input']!r}"  # it may be a secret
    return f"configuration key {key}: {error['msg'].lower().removeprefix('value error, ')}{found}"
