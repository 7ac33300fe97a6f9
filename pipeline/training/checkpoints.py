"""Keeps the state of a training in a file, from which an interrupted one goes on as if nothing had happened."""

import logging
import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.training.student import Student

log = logging.getLogger(__name__)


@dataclass
class TrainingProgress:
    """The steps, tokens and time of a training so far.

    Attributes:
        steps: optimizer steps taken.
        trees: training trees read, and so the number of the next one.
        tokens: tokens of these trees.
        seconds: time spent on them, without evaluations.
    """

    steps: int = 0
    trees: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Checkpoint:
    """The file of a training's state.

    Attributes:
        file: path of the file.
        identity: all settings that the result depends on; a training goes on only under the same.
    """

    file: Path
    identity: Mapping[str, Any]

    def save(self, student: Student, optimizer: torch.optim.Optimizer, progress: TrainingProgress) -> None:
        """Replace the file, which is at every time either the old or the new one."""
        state = {
            "identity": dict(self.identity),
            "progress": asdict(progress),
            "weights": {name: weight.detach() for name, weight in student.trainable.items()},
            "optimizer": optimizer.state_dict(),
        }
        unfinished = self.file.with_suffix(".unfinished")
        torch.save(state, unfinished)
        unfinished.replace(self.file)

    def check(self) -> None:
        """Check that the file, if there is one, is of a training with the same settings.

        Raises:
            ValueError: a setting differs, which the message names, or the file is damaged.
        """
        if not self.file.exists():
            return
        kept = self._load("cpu", mmap=True)["identity"]
        for name in sorted({*kept, *self.identity}):
            if kept.get(name) != self.identity.get(name):
                raise ValueError(
                    f"{self.file}: this training began with {name} {kept.get(name)}, not {self.identity.get(name)}; "
                    "continue it with the same settings, or choose another --output"
                )

    def restore(self, student: Student, optimizer: torch.optim.Optimizer) -> TrainingProgress:
        """Load the state, if there is one, into a model and its optimizer, and return how far the training is."""
        if not self.file.exists():
            return TrainingProgress()
        state = self._load(student.device)
        with torch.no_grad():
            for name, weight in student.trainable.items():
                weight.copy_(state["weights"][name])
        optimizer.load_state_dict(state["optimizer"])
        progress = TrainingProgress(**state["progress"])
        log.info("continuing after step %d", progress.steps)
        return progress

    def _load(self, device: torch.device | str, mmap: bool = False) -> dict[str, Any]:
        try:
            state: dict[str, Any] = torch.load(self.file, map_location=device, weights_only=True, mmap=mmap)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"{self.file}: cannot be read ({error}); remove it to begin anew") from None
        return state
