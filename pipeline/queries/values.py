"""Convert a source's values to those of a query set: texts, lists, choices and given passages."""

import ast
import hashlib
import io
import json
import math
import re
import tokenize
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any
from uuid import UUID

# A list within a string, in JSON as in PopQA's possible_answers, or in Python as pandas writes it.
WRITTEN_LIST = re.compile(r"""\s*\[.*\]\s*|\s*\(\s*['"].*\)\s*""", re.DOTALL)
# What only a list begins with; other strings in brackets may be texts.
QUOTED_LIST = re.compile(r"""\s*\[\s*['"]""")


def to_text(value: Any) -> str | None:
    """Convert a value to text: a number or boolean to its JSON form, a UUID to its own; null, NaN or blank to None.

    Raises:
        ValueError: the value is of another type, or not UTF-8.
    """
    if is_missing(value):
        return None
    if isinstance(value, (bool, int, float)):
        return json.dumps(value)
    if isinstance(value, UUID):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(
            f"expected text, found {_describe_type(value)} (map a field, such as --column answers=answer.aliases)"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"not UTF-8: {error}") from None
    return value


def is_missing(value: Any) -> bool:
    """Whether a value is null, NaN or blank."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))


def to_texts(value: Any) -> list[str] | None:
    """Flatten a list, nested lists, or a list within a string to its texts; a single text becomes a list of one.

    Blank and repeated texts are left out. A string in brackets that is no list, such as ``[sic]``, is a text.

    Raises:
        ValueError: an item is not a text, or a string begins as a list of texts but cannot be read as one.
    """
    if isinstance(value, str) and (WRITTEN_LIST.fullmatch(value) or QUOTED_LIST.match(value)):
        try:
            value = parse_list(value)
        except ValueError:
            if QUOTED_LIST.match(value):
                raise
    found = (to_text(item) for item in _flatten(value))
    return list(dict.fromkeys(item for item in found if item is not None)) or None


def _flatten(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        for item in value:
            yield from _flatten(item)
    else:
        yield value


def to_text_sets(value: Any) -> list[list[str]] | None:
    """Convert a list to sets of short answers; empty sets are left out."""
    return [found for found in map(to_texts, _to_items(value)) if found] or None


def to_choices(value: Any) -> list[Any] | None:
    """Convert a list to choices: texts, or objects with a label and a text, which :func:`replace_labels` replaces."""
    return [_to_choice(item) for item in _to_items(value)] or None


def _to_choice(item: Any) -> Any:
    return item if is_labeled(item) else to_text(item)


def to_passages(value: Any) -> list[dict[str, Any]] | None:
    """Convert a list to given passages; fields other than id, title and text are left out.

    A passage without an id gets a digest of its title and text. Of passages with equal ids, the second and later ones
    end in -2, -3, …
    """
    found = _to_items(value)
    for item in found:
        if not isinstance(item, dict):
            raise ValueError(f"expected a passage with id, title and text, found {_describe_type(item)}")
    passages = [_to_passage(item) for item in found]
    used: set[str] = set()
    for passage in passages:
        name, number = passage["id"], 1
        while passage["id"] in used:
            number += 1
            passage["id"] = f"{name}-{number}"
        used.add(passage["id"])
    return passages or None


def _to_passage(item: Mapping[str, Any]) -> dict[str, Any]:
    passage = {name: to_text(item.get(name)) for name in ("id", "title", "text")}
    if passage["id"] is None:
        passage["id"] = hash_values([passage["title"], passage["text"]])
    return passage


def hash_values(values: list[Any]) -> str:
    """Return a digest of values that JSON can hold: 20 hexadecimal digits."""
    return hashlib.sha256(json.dumps(values, ensure_ascii=False).encode()).hexdigest()[:20]


def _to_items(value: Any) -> list[Any]:
    """Return the items of a list, of a list within a string, or of an object of equally long lists."""
    if is_missing(value):
        return []
    if isinstance(value, str):
        value = parse_list(value)
    if isinstance(value, dict) and value and all(isinstance(member, list) for member in value.values()):
        return [dict(zip(value, members, strict=True)) for members in zip(*value.values(), strict=True)]
    if not isinstance(value, list):
        raise ValueError(f"expected a list, found {_describe_type(value)}")
    return value


def parse_list(text: str) -> Any:
    """Read a list, or an object of lists, that is written in JSON or as a Python literal; a tuple becomes a list.

    Raises:
        ValueError: the text is neither, or has strings without commas between them, as NumPy writes arrays.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        value = ast.literal_eval(_MissingNames().visit(ast.parse(text.strip(), mode="eval")))
        tokens = [token.type for token in tokenize.generate_tokens(io.StringIO(text.strip()).readline)]
        written = _to_lists(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError, tokenize.TokenError):
        raise ValueError(f"expected a list, found {text[:60]!r}, which is neither JSON nor a Python list") from None
    if (tokenize.STRING, tokenize.STRING) in pairwise(token for token in tokens if token != tokenize.NL):
        raise ValueError(f"expected a list, found {text[:60]!r}, which has no commas between its texts")
    return written


class _MissingNames(ast.NodeTransformer):
    """Replaces ``nan`` and ``NaT``, which pandas writes for missing values, by None."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(None) if node.id in ("nan", "NaN", "NaT") else node


def _to_lists(value: Any) -> Any:
    """Turn tuples into lists.

    Raises:
        ValueError: there is a value that JSON does not have, such as ``...`` or bytes.
    """
    if isinstance(value, (list, tuple)):
        return [_to_lists(item) for item in value]
    if isinstance(value, dict):
        return {name: _to_lists(item) for name, item in value.items()}
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise ValueError(f"{type(value).__name__} in a list")


def is_labeled(item: Any) -> bool:
    """Whether an item is a choice with a label and a text, as in ARC."""
    return isinstance(item, dict) and item.keys() >= {"label", "text"}


def _describe_type(value: Any) -> str:
    kinds: dict[type, str] = {dict: "an object", list: "a list", str: "text"}
    return kinds.get(type(value), type(value).__name__)
