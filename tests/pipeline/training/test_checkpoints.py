from pathlib import Path

import pytest
import torch

from pipeline.training.checkpoints import Checkpoint, TrainingProgress
from pipeline.training.student import Student
from tests.support.students import load_student, write_base


@pytest.fixture
def student(tmp_path: Path) -> Student:
    return load_student(write_base(tmp_path / "base"))


def make_optimizer(student: Student) -> torch.optim.Optimizer:
    return torch.optim.AdamW(student.trainable.values(), lr=0.1)


def test_state_is_restored(student: Student, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "state.pt", {"seed": 1})
    optimizer = make_optimizer(student)
    torch.stack([weight.sum() for weight in student.trainable.values()]).sum().backward()
    optimizer.step()
    kept = {name: weight.detach().clone() for name, weight in student.trainable.items()}
    checkpoint.save(student, optimizer, TrainingProgress(3, 40, 500, 6.5))
    optimizer.step()
    assert any(not torch.equal(weight, kept[name]) for name, weight in student.trainable.items())
    again = make_optimizer(student)
    assert checkpoint.restore(student, again) == TrainingProgress(3, 40, 500, 6.5)
    assert all(torch.equal(weight, kept[name]) for name, weight in student.trainable.items())
    assert {float(state["step"]) for state in again.state.values()} == {1.0}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["base", "state.pt"]


def test_without_a_state_training_begins(student: Student, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "state.pt", {"seed": 1})
    checkpoint.check()
    assert checkpoint.restore(student, make_optimizer(student)) == TrainingProgress()


def test_state_of_other_settings_is_refused(student: Student, tmp_path: Path) -> None:
    file = tmp_path / "state.pt"
    Checkpoint(file, {"rank": 16, "seed": 1}).save(student, make_optimizer(student), TrainingProgress())
    Checkpoint(file, {"rank": 16, "seed": 1}).check()
    with pytest.raises(ValueError, match="began with rank 16, not 32"):
        Checkpoint(file, {"rank": 32, "seed": 2}).check()
    file.write_bytes(file.read_bytes()[:1_000])
    with pytest.raises(ValueError, match=r"state\.pt: cannot be read"):
        Checkpoint(file, {"rank": 16, "seed": 1}).check()
