"""The runbook names what there is: a message stands between double backquotes, with … for what varies."""

import ast
import json
import re
import subprocess
from pathlib import Path

import pandas
import pytest

from pipeline.config.reference import describe_keys

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "infra" / "RUNBOOK.md").read_text("utf-8")
MESSAGES = re.findall(r"(?<!`)``([^`]+)``(?!`)", TEXT)
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def said() -> list[str]:
    """All texts in the sources but docstrings, with … for what is filled in."""
    texts = []
    for file in [*ROOT.glob("jobs/**/*.py"), *ROOT.glob("pipeline/**/*.py")]:
        nodes = list(ast.walk(ast.parse(file.read_text("utf-8"))))
        docstrings = [node.value for node in nodes if isinstance(node, ast.Expr)]
        for node in nodes:
            if isinstance(node, ast.JoinedStr):
                texts.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings:
                texts.append(node.value)
    return texts


SAID = said()


def is_said(message: str) -> bool:
    pattern = re.compile(".*?".join(re.escape(part) for part in message.split("…")))
    return any(pattern.search(text) for text in SAID)


@pytest.mark.parametrize("message", MESSAGES)
def test_quoted_messages_are_in_the_code(message):
    assert is_said(message), f"infra/RUNBOOK.md: no source says ``{message}``; quote it as it is now"


def test_message_lookup_rejects_invented_messages():
    assert len(MESSAGES) > 30
    assert "another run is using this output (process … on …, since …)" in MESSAGES
    assert not is_said("another run is at play there (process … on …, since …)")
    assert not is_said("Everything that can be checked before an engine starts")  # a docstring


def test_named_configuration_keys_exist():
    known = {key.name for key in describe_keys()}
    named = set(re.findall(r"\b(?:decoding|model|retrieval|execution|storage)(?:\.[a-z_]+)+\b(?!\.py)", TEXT))
    # Below model.engine, vLLM's own arguments are named.
    assert {name for name in named if not known & {name, name.rpartition(".")[0]}} == set()
    assert len(named) > 20


def test_named_metrics_and_panels_are_on_the_dashboard():
    board = (ROOT / "infra" / "grafana" / "selfrag.json").read_text()
    titles = {panel["title"] for panel in json.loads(board)["panels"]}
    metrics = set(re.findall(r"ray_selfrag_\w+", TEXT))
    assert metrics
    assert {name for name in metrics if name not in board} == set()
    panels = set(re.findall(r"(?<!\*)\*([A-Z][a-z ]+)\*(?!\*)", TEXT))
    assert panels >= {"Engine", "Rows in flight"}
    assert panels <= titles


def test_links_resolve_to_files_and_headings():
    headings = {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in headings_of(TEXT)}
    for link in re.findall(r"\]\(([^)]+)\)", TEXT):
        if link.startswith("#"):
            assert link[1:] in headings, link
        elif "://" not in link:  # test_docs.py checks its heading
            assert (ROOT / "infra" / link.partition("#")[0]).exists(), link


def headings_of(text: str) -> list[str]:
    return re.findall(r"^#+ (.+)$", text, re.MULTILINE)


def test_snippets_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, columns in {
        "data": {"id": ["a"], "usage": [{"seconds": 4.0, "cached_tokens": 25}]},
        "errors": {"id": ["b"], "error_type": ["TimeoutError"], "error_message": ["no answer"], "attempts": [1]},
    }.items():
        folder = tmp_path / "annotated" / name
        folder.mkdir(parents=True)
        pandas.DataFrame(columns).to_parquet(folder / "part-0.parquet")
    (tmp_path / "annotated" / "data" / ".part-1.parquet.0123.tmp").touch()
    (tmp_path / "annotated" / "_manifest.json").write_text('{"status": "running"}')
    ((_, python),) = [block for block in BLOCKS if block[0] == "python"]
    ((_, shell),) = [block for block in BLOCKS if block[0] == "bash"]
    exec(python, {})
    shown = capsys.readouterr().out
    assert "TimeoutError" in shown
    assert '"status": "running"' in shown
    assert "cached_tokens" in shown
    subprocess.run(["bash", "-c", shell], check=True)
    assert sorted(file.name for file in (tmp_path / "annotated").rglob("*.*")) == [
        "_manifest.json",
        "part-0.parquet",
        "part-0.parquet",
    ]
