"""The card of an annotated set, and its way to the hub, which was never asked: a recorder stands in its place."""

import json
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa
import pytest
import typer
from typer.testing import CliRunner, Result

from jobs.share import share
from pipeline.output.dataset_card import render_columns
from tests.jobs.test_rescore import annotated_set
from tests.support.s3 import S3Server

APP = typer.Typer()
APP.command()(share)


def run(folder: object, *options: str) -> Result:
    return CliRunner().invoke(APP, ["--annotations", str(folder), *options])


@pytest.fixture
def annotated(tmp_path: Path) -> Path:
    return annotated_set(tmp_path / "run", rows=4)


class Hub:
    """Records what a hub would be told, and the names of the files that match."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.files: set[str] = set()

    def create_repo(self, name: str, **options: Any) -> str:
        self.calls.append({"name": name, **options})
        return f"https://huggingface.co/datasets/{name}"

    def upload_folder(self, **options: Any) -> None:
        self.calls.append(options)
        folder, patterns = Path(options["folder_path"]), options["allow_patterns"]
        paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
        self.files |= {str(path) for path in paths if any(path.match(pattern) for pattern in patterns)}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    recorder = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: recorder)
    return recorder


def names(folder: Path) -> set[str]:
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return {str(path) for path in paths if path.name != "_SUCCESS"}


def test_set_with_a_card_loads_with_datasets(annotated: Path, tmp_path: Path) -> None:
    result = run(annotated, "--license", "cc-by-sa-4.0")
    assert result.exit_code == 0, result.output
    cache = str(tmp_path / "cache")
    answers = datasets.load_dataset(str(annotated), split="train", cache_dir=cache)
    failed = datasets.load_dataset(str(annotated), "errors", split="train", cache_dir=cache)
    assert answers["id"] == [f"{unit}-{n}" for unit in (0, 1) for n in range(3)]
    assert answers["usage"][0]["engine_requests"] > 0
    assert failed["error_message"] == ["the query is empty"] * 2


def test_edited_card_is_kept(annotated: Path) -> None:
    run(annotated)
    card = annotated / "README.md"
    edited = card.read_text().replace("## Caveats", "## Mine")
    card.write_text(edited)
    assert run(annotated).exit_code == 0
    assert card.read_text() == edited
    assert run(annotated, "--overwrite").exit_code == 0
    assert "## Caveats" in card.read_text()


@pytest.mark.parametrize(("options", "what"), [([], "run"), (["--license", "mit"], "license")])
def test_card_of_another_run_or_license_is_not_shared(annotated: Path, hub: Hub, options: list[str], what: str) -> None:
    run(annotated)
    if what == "run":
        manifest = json.loads((annotated / "_manifest.json").read_text())
        (annotated / "_manifest.json").write_text(json.dumps(manifest | {"finished": "2031-01-01T00:00:00"}))
    result = run(annotated, "--push-to-hub", "me/answers", *options)
    assert result.exit_code == 2
    assert f"README.md is for another {what} (" in result.stderr
    assert "pass --overwrite to replace it" in result.stderr
    assert hub.files == set()
    assert run(annotated, "--push-to-hub", "me/answers", *options, "--overwrite").exit_code == 0


def test_column_names_are_escaped_in_markdown() -> None:
    table = render_columns(pa.schema([("a|`b`\n![x](https://e.org/i)", pa.string()), ("answer", pa.string())]))
    assert table.splitlines()[2] == r"| `a\|'b' ![x](https://e.org/i)` | unchanged from the query set |"


def test_push_uploads_only_the_set_its_card_and_manifest(annotated: Path, hub: Hub) -> None:
    (annotated / "notes.txt").write_text("not yours")
    result = run(annotated, "--push-to-hub", "me/answers")
    assert result.exit_code == 0, result.output
    created, uploaded = hub.calls
    assert created == {"name": "me/answers", "repo_type": "dataset", "private": True, "exist_ok": True}
    assert (uploaded["repo_id"], uploaded["repo_type"]) == ("me/answers", "dataset")
    assert uploaded["delete_patterns"] == ["data/*.parquet", "errors/*.parquet"]
    assert hub.files == names(annotated) - {"notes.txt"}
    assert {"README.md", "_manifest.json"} < hub.files
    assert 'load_dataset("me/answers"' in (annotated / "README.md").read_text()


def test_set_on_object_storage_can_be_pushed(
    annotated: Path, hub: Hub, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    for path in annotated.rglob("*"):
        if path.is_file():
            with s3.filesystem().open_output_stream(f"{s3.bucket}/shared/{path.relative_to(annotated)}") as stream:
                stream.write(path.read_bytes())
    result = run(f"s3://{s3.bucket}/shared", "--push-to-hub", "me/answers")
    assert result.exit_code == 0, result.output
    assert hub.files == {*names(annotated), "README.md"}


@pytest.mark.parametrize(
    ("arguments", "status", "problem"),
    [
        (["--annotations", "NOWHERE"], 2, "not a finished annotated set"),
        (["--annotations", "SET", "--push-to-hub", "me/a/b"], 2, "me/a/b: Repo id must be in the form"),
        (["--annotations", "SET", "--push-to-hub", "me/a"], 1, "me/a: Cannot reach https://huggingface.co"),
        (["--annotations", "SET", "--set", "model.name=x"], 2, "only storage.* can be set here"),
    ],
)
def test_refused_share_gives_one_line_and_writes_no_card(
    annotated: Path, arguments: list[str], status: int, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    places = {"SET": str(annotated), "NOWHERE": str(annotated / "data")}
    result = CliRunner().invoke(APP, [places.get(word, word) for word in arguments])
    assert result.exit_code == status, result.output
    (line,) = result.stderr.splitlines()
    assert problem in line
    assert "hf_secret" not in result.output
    assert not (annotated / "README.md").exists()
