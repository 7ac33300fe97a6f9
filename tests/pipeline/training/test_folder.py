from pathlib import Path

import pytest

from pipeline.training.folder import TrainingFolder


def test_output_appears_when_it_is_complete(tmp_path: Path) -> None:
    folder = TrainingFolder(tmp_path / "deep" / "taught")
    folder.begin(resume=False)
    folder.state.write_text("state")
    (folder.unfinished / "config.json").write_text("{}")
    assert not folder.output.exists()
    folder.finish()
    assert [file.name for file in folder.output.iterdir()] == ["config.json"]
    assert not folder.unfinished.exists()
    with pytest.raises(ValueError, match="taught: exists; choose another --output"):
        folder.begin(resume=True)


def test_interrupted_training_is_entered_only_on_request(tmp_path: Path) -> None:
    folder = TrainingFolder(tmp_path / "taught")
    folder.begin(resume=False)
    folder.begin(resume=False)  # nothing was kept yet
    folder.state.write_text("state")
    with pytest.raises(
        ValueError, match=r"taught\.unfinished: holds an interrupted training; continue it with --resume"
    ):
        folder.begin(resume=False)
    folder.begin(resume=True)
    assert folder.state.read_text() == "state"
