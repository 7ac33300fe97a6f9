"""Folders of other users."""

import os
from pathlib import Path
from typing import Any

import pytest


def make_read_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forbid to write to a folder, even to root."""
    allowed = os.access

    def access(path: Any, mode: int) -> bool:
        return allowed(path, mode) and not (mode & os.W_OK and Path(path).is_relative_to(folder))

    monkeypatch.setattr("pipeline.config.paths.os.access", access)
