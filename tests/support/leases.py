"""Leases of runs that do not exist."""

import json
import threading
from pathlib import Path

from pipeline.storage.lease import Holder


def leave_lease(output: Path, **changes: object) -> Path:
    """Write the file of a lease on an output; by default one of this process, long ago."""
    holder = {**vars(Holder.from_this_process()), "id": "0" * 32, "started": 1.0, **changes}
    file = output / "_running" / f"{holder['id']}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".unfinished")  # a reader must not see half a file
    unfinished.write_text(json.dumps(holder))
    unfinished.rename(file)
    return file


def finishing_elsewhere(output: Path, aside: Path) -> threading.Thread:
    """Make a finished output look as if another machine were at work on it, which finishes it a second later.

    Args:
        aside: where the output's files are meanwhile.
    """
    output.rename(aside)
    lease = leave_lease(output, host="elsewhere")

    def finish() -> None:
        for file in aside.iterdir():
            file.rename(output / file.name)
        lease.unlink()

    timer = threading.Timer(1.5, finish)
    timer.start()
    return timer
