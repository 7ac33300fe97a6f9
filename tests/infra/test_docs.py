"""The commands in the documentation: their options exist, and so do the settings that they make."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.cli import load_command
from pipeline.config.loading import apply_settings
from pipeline.config.run import load_config

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "infra").rglob("*.md"))]
# What a run needs that a command in the documentation leaves out.
NEEDED = {"queries": "q", "output": "o", "model.name": "m"}


def commands() -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Document, job and words of each ``python -m jobs.NAME …`` in a block of code."""
    for file in DOCUMENTS:
        for block in re.findall(r"^```\w*\n(.*?)^```", file.read_text(), re.MULTILINE | re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if found := re.search(r"python -m jobs\.([\w.]+)(.*)", line):
                    yield file.name, found[1].replace(".", "_"), words_of(re.sub(r"[\[\]]", "", found[2]))


def words_of(line: str) -> tuple[str, ...]:
    """A command's words: comments and what a shell does with its output left out."""
    return tuple(shlex.split(re.split(r"\s(?:>|\||&|2>)", line)[0], comments=True))


COMMANDS = sorted(set(commands()))


def test_documents_show_commands_of_most_jobs() -> None:
    assert {"annotate", "build_index", "evaluate", "import_queries", "report", "share"} <= {
        job for _, job, _ in COMMANDS
    }
    assert len(COMMANDS) > 20


@pytest.mark.parametrize(("document", "job", "words"), COMMANDS)
def test_documented_commands_use_existing_options(document: str, job: str, words: tuple[str, ...]) -> None:
    context = load_command(job).make_context(job, list(words))
    settings = context.params.get("settings") or []
    if job == "annotate":
        load_config(None, settings, NEEDED)
    else:
        apply_settings({}, settings)


def test_file_links_resolve() -> None:
    for file in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", file.read_text()):
            assert (file.parent / target).exists(), f"{file.name}: {target}"


def test_heading_links_resolve() -> None:
    for file in DOCUMENTS:
        for target, heading in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", file.read_text()):
            assert heading in anchors(file.parent / target if target else file), f"{file.name}: {target}#{heading}"


def anchors(file: Path) -> set[str]:
    """What GitHub makes of a document's headings."""
    titles = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
