"""The image is pinned, locked, small and not root's; it cannot be built here, so its text is read."""

import fnmatch
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "infra" / "docker" / "Dockerfile").read_text()
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def instructions(name: str) -> list[str]:
    """The arguments of all instructions of this name, without comments and line breaks."""
    code = "\n".join(line for line in TEXT.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", code)
    return [line.partition(" ")[2] for line in joined.splitlines() if line.startswith(f"{name} ")]


def reaches_the_build(path: str) -> bool:
    """Whether .dockerignore lets a path of the repository through; the last line that matches decides."""
    ignored = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        if line and not line.startswith("#") and any(_parents_match(path, pattern)):
            ignored = not line.startswith("!")
    return not ignored


def _parents_match(path: str, pattern: str) -> list[bool]:
    plain = pattern.removeprefix("**/")
    tails = [Path(path), *Path(path).parents][:-1]
    return [fnmatch.fnmatch(str(tail), pattern) or (plain != pattern and tail.name == plain) for tail in tails]


def test_base_image_tag_pins_the_python_version() -> None:
    stages = {words.split(" AS ")[1] for words in instructions("FROM") if " AS " in words}
    bases = [words.split(" ")[0] for words in instructions("FROM") if words.split(" ")[0] not in stages]
    assert bases == ["python:3.11-slim-bookworm"]


def test_image_runs_as_the_unprivileged_user_it_creates() -> None:
    assert instructions("USER") == ["1000:1000"]
    assert "useradd --uid 1000 --create-home" in TEXT
    assert "HOME=/home/selfrag" in instructions("ENV")[-1]


def test_dependencies_and_uv_are_pinned() -> None:
    (install,) = [words for words in instructions("RUN") if "--requirements" in words]
    assert '--constraints "$EXTRAS.txt"' in install
    assert '--requirements pyproject.toml --extra "$EXTRAS"' in install
    assert "--compile-bytecode" in install
    (uv,) = re.findall(r"^UV_VERSION := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert f"uv=={uv} " in instructions("RUN")[0]


def test_copied_files_exist_and_are_not_ignored() -> None:
    copied = [words for words in instructions("COPY") if not words.startswith(("--from", "."))]
    sources = [source for words in copied for source in words.split()[:-1]]
    assert sources == ["pyproject.toml", "infra/locks/${EXTRAS}.txt"]
    for source in ["pyproject.toml", "infra/locks/cpu.txt", "infra/locks/gpu.txt"]:
        assert (ROOT / source).is_file()
        assert reaches_the_build(source)


def test_build_context_holds_only_the_code_and_the_demo() -> None:
    seen = [
        "README.md",
        "jobs/annotate.py",
        "pipeline/decoding/profiles.yaml",
        "infra/demo/adapter/adapter_model.safetensors",
    ]
    unseen = [
        ".git/config",
        ".venv/bin/python",
        "tests/support/fakes.py",
        "out/x",
        "infra/SIZING.md",
        "jobs/__pycache__/x.pyc",
    ]
    assert [path for path in [*seen, *unseen] if reaches_the_build(path)] == seen


def test_model_and_index_caches_are_on_the_volume() -> None:
    from pipeline.config.sections import RetrievalConfig

    assert instructions("VOLUME") == ["/home/selfrag/.cache"]
    assert RetrievalConfig().cache == "~/.cache/selfrag/index"


def test_entry_point_is_selfrag_and_label_is_the_project_version() -> None:
    assert instructions("ENTRYPOINT") == ['["selfrag"]']
    assert f"org.opencontainers.image.version={VERSION} " in instructions("LABEL")[0]
