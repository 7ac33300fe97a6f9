"""Fixtures: a folder, and an index of 60 vectors in three shards."""

from pathlib import Path

import pytest
from pyarrow import fs

from pipeline.config import StorageConfig
from pipeline.storage import Location, locate
from tests.indexes import save, unit_vectors


@pytest.fixture
def folder(tmp_path: Path) -> Location:
    return locate(str(tmp_path / "index"), StorageConfig())


@pytest.fixture
def saved(folder: Location) -> Location:
    vectors = unit_vectors(60)
    save(folder, [vectors[:25], vectors[25:30], vectors[30:]])
    return folder


@pytest.fixture
def remote(saved: Location) -> Location:
    """The saved index behind a file system that is not a local disk."""
    path = Path(saved.path)
    return Location("mem://index", fs.SubTreeFileSystem(str(path.parent), fs.LocalFileSystem()), path.name)
