"""The prose of the code: how docstrings begin, and how long files and functions are."""

import ast
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted([*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "jobs").rglob("*.py")])
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def docstrings(file: Path) -> Iterator[tuple[str, str]]:
    """Name and docstring of everything in a file that has one."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, Documented) and (text := ast.get_docstring(node)):
            yield getattr(node, "name", file.name), text


def function_lengths() -> dict[str, int]:
    """Lines of each function's body without its docstring."""
    lengths = {}
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
                lengths[f"{file.relative_to(ROOT)}:{node.lineno} {node.name}"] = lines
    return lengths


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_docstrings_do_not_begin_with_question_words(file: Path) -> None:
    refused = {"what", "who", "whom", "whose", "none", "how", "where", "nobody", "somebody"}
    assert [name for name, text in docstrings(file) if text.split()[0].lower().strip(".,:") in refused] == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_is_defined_after_the_main_guard(file: Path) -> None:
    body = ast.parse(file.read_text()).body
    guards = [n for n, node in enumerate(body) if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)]
    assert guards in ([], [len(body) - 1])


def test_files_and_functions_are_short() -> None:
    assert {str(file): lines for file in FILES if (lines := len(file.read_text().splitlines())) > 400} == {}
    lengths = function_lengths()
    assert {name: lines for name, lines in lengths.items() if lines > 50} == {}
    assert statistics.median(lengths.values()) <= 6
