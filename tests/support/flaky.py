"""A file system that is not local and fails as an object store does."""

from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from pipeline.storage.location import Location

BUSY = "When reading: AWS Error SLOW_DOWN during GetObject operation: Reduce your request rate"


class FlakyFiles(fs.FileSystemHandler):  # type: ignore[misc]
    """A folder whose next operations fail, so many of them as ``failures`` holds; notes what is opened for reading."""

    def __init__(self, root: Path, failures: list[str]) -> None:
        self.inner = fs.SubTreeFileSystem(str(root), fs.LocalFileSystem())
        self.failures = failures
        self.opened: list[str] = []

    def fail(self) -> None:
        if self.failures:
            raise OSError(self.failures.pop(0))

    def open_input_file(self, path: str) -> pa.NativeFile:
        self.opened.append(path)
        self.fail()
        return self.inner.open_input_file(path)

    def open_input_stream(self, path: str) -> pa.NativeFile:
        self.opened.append(path)
        self.fail()
        return self.inner.open_input_stream(path)

    def open_output_stream(self, path: str, metadata: object) -> pa.NativeFile:
        self.fail()
        return self.inner.open_output_stream(path)

    def delete_file(self, path: str) -> None:
        self.inner.delete_file(path)
        self.fail()  # done, and the answer is lost

    def get_file_info(self, paths: list[str]) -> list[fs.FileInfo]:
        self.fail()
        return self.inner.get_file_info(paths)

    def get_file_info_selector(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        self.fail()
        return self.inner.get_file_info(selector)

    def get_type_name(self) -> str:
        return "flaky"

    def normalize_path(self, path: str) -> str:
        return path

    def _no(self, *_: object) -> None:
        raise NotImplementedError

    copy_file = create_dir = delete_dir = delete_dir_contents = delete_root_dir_contents = move = _no
    open_append_stream = _no


def flaky(root: Path, failures: list[str], patience_s: float = 60.0) -> tuple[Location, FlakyFiles]:
    """The folder as a location, and its file system."""
    files = FlakyFiles(root, failures)
    return Location("mem://folder", fs.PyFileSystem(files), "", patience_s), files
