"""Exchange two folders of a local disk in one step, so that readers see either the one or the other."""

import ctypes
import os
import tempfile
from pathlib import Path

# https://man7.org/linux/man-pages/man2/rename.2.html; Python's os module has no such function.
AT_FDCWD = -100
RENAME_EXCHANGE = 2


def exchange_folders(one: Path, other: Path) -> None:
    """Exchange two folders of one file system atomically.

    Raises:
        OSError: the file system cannot exchange folders, as NFS cannot, or one of them is a mount point.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    ends = os.fsencode(one), os.fsencode(other)
    if libc.renameat2(AT_FDCWD, ends[0], AT_FDCWD, ends[1], RENAME_EXCHANGE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(one))


def can_exchange(folder: Path) -> bool:
    """Whether a folder can be exchanged with one beside it; tries it with two new folders.

    Raises:
        OSError: nothing can be created beside it.
    """
    if folder.is_mount():
        return False
    with tempfile.TemporaryDirectory(prefix=".exchange-", dir=folder.parent) as scratch:
        ends = [Path(scratch) / name for name in ("one", "other")]
        for end in ends:
            end.mkdir()
        try:
            exchange_folders(*ends)
        except OSError:
            return False
    return True
