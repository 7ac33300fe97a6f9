"""Keeps the results of a training apart until they are complete."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TrainingFolder:
    """The folder of a training's results: ``unfinished``, which becomes ``output`` when it is complete."""

    output: Path

    @property
    def unfinished(self) -> Path:
        """Folder of the training in progress."""
        return self.output.with_name(f"{self.output.name}.unfinished")

    @property
    def state(self) -> Path:
        """File of the training's state."""
        return self.unfinished / "state.pt"

    def begin(self, resume: bool) -> None:
        """Create the folder, or enter that of an interrupted training.

        Raises:
            ValueError: the output exists, or an interrupted training should not be continued.
        """
        if self.output.exists():
            raise ValueError(f"{self.output}: exists; choose another --output, or remove it")
        if self.state.exists() and not resume:
            raise ValueError(
                f"{self.unfinished}: holds an interrupted training; continue it with --resume, or remove the folder"
            )
        self.unfinished.mkdir(parents=True, exist_ok=True)

    def finish(self) -> None:
        """Turn the folder into the output, which only then may lose the state."""
        self.unfinished.rename(self.output)
        (self.output / self.state.name).unlink(missing_ok=True)
