"""The rooms of ``pipeline`` are those of its map, and each imports only what the map allows."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pipeline

ROOT = Path(__file__).parents[2]
HOME = ROOT / "pipeline"
# Libraries that stand behind a protocol or a helper, and the rooms that may know them.
LIBRARIES = {
    "vllm": {"engine", "doctor"},
    "faiss": {"retrieval", "indexing", "doctor"},
    "ray": {"cluster", "gpus", "nodes", "run", "indexing", "retrieval", "evaluation", "doctor", "tuning"},
    "pyarrow": {
        "storage",
        "queries",
        "output",
        "retrieval",
        "indexing",
        "evaluation",
        "report",
        "publishing",
        "run",
        "training",
        "tracking",
        "doctor",
    },
    "smart_open": {"config", "queries"},
    "deltalake": {"publishing"},
    "pyiceberg": {"publishing"},
    "mlflow": {"tracking"},
    "openlineage": {"tracking"},
}


def read_map() -> dict[str, set[str]]:
    """The rooms of the map with those that each may import."""
    table = re.split(r"^=[= ]+$", pipeline.__doc__ or "", flags=re.MULTILINE)[2]
    rooms: dict[str, set[str]] = {}
    for line in table.strip().splitlines():
        if line.startswith(" "):
            rooms[list(rooms)[-1]] |= set(line.split())
        else:
            name, _, allowed = re.split(r" {2,}", line)
            rooms[name] = set(allowed.split()) - {"nothing"}
    return rooms


def imported(file: Path) -> Iterator[str]:
    """Names of all modules that a file imports, within functions too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files_of(room: str) -> list[Path]:
    single = HOME / f"{room}.py"
    return [single] if single.exists() else sorted((HOME / room).glob("*.py"))


ROOMS = read_map()


def test_map_lists_every_package() -> None:
    packages = {folder.parent.name for folder in HOME.glob("*/__init__.py")}
    modules = {file.stem for file in HOME.glob("*.py")} - {"__init__"}
    assert set(ROOMS) == packages | modules


def test_packages_import_only_those_above_them_in_the_map() -> None:
    order = list(ROOMS)
    for room, allowed in ROOMS.items():
        assert allowed <= set(order[: order.index(room)]), room


@pytest.mark.parametrize("room", ROOMS)
def test_package_imports_match_the_map_exactly(room: str) -> None:
    found = {name.split(".")[1] for file in files_of(room) for name in imported(file) if name.startswith("pipeline.")}
    assert found - {room} == ROOMS[room]


@pytest.mark.parametrize("library", LIBRARIES)
def test_libraries_are_imported_only_by_their_packages(library: str) -> None:
    users = {
        room for room in ROOMS for file in files_of(room) for name in imported(file) if name.split(".")[0] == library
    }
    assert users <= LIBRARIES[library]


def test_public_functions_and_classes_have_unique_names() -> None:
    places: dict[str, list[str]] = {}
    for file in [*HOME.rglob("*.py"), *(ROOT / "jobs").rglob("*.py")]:
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name[0] != "_":
                places.setdefault(node.name, []).append(str(file.relative_to(ROOT)))
    assert {name: files for name, files in places.items() if len(files) > 1} == {}


def test_pipeline_does_not_import_commands() -> None:
    for file in HOME.rglob("*.py"):
        assert not [name for name in imported(file) if name.split(".")[0] == "jobs"], file


def test_decoding_imports_no_heavy_libraries() -> None:
    modules = [f"pipeline.decoding.{file.stem}" for file in files_of("decoding") if file.stem != "__init__"]
    script = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"vllm", "faiss", "ray", "pyarrow", "torch"} & set(done.stdout.split())


@pytest.mark.parametrize("room", [room for room in ROOMS if (HOME / room).is_dir()])
def test_tests_mirror_the_packages(room: str) -> None:
    modules = {file.stem for file in (HOME / room).glob("*.py")}
    for test in (ROOT / "tests" / "pipeline" / room).glob("test_*.py"):
        about = test.stem.removeprefix("test_")
        assert any(about == module or about.startswith(f"{module}_") for module in modules), test
