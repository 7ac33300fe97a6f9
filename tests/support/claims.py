"""Claims of runs that are not there."""

import json
import threading
from pathlib import Path

from pipeline.storage.lease import Owner


def claim_of(output: Path, **changes: object) -> Path:
    """The file of a claim on an output; by default this process's own, long ago."""
    owner = {**vars(Owner.me()), "id": "0" * 32, "started": 1.0, **changes}
    file = output / "_running" / f"{owner['id']}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(owner))
    return file


def finishing_elsewhere(output: Path, aside: Path) -> threading.Thread:
    """Make a finished output look as if another machine were at work on it, which finishes it a second later.

    Args:
        aside: where the output's files are meanwhile.
    """
    output.rename(aside)
    claim = claim_of(output, host="elsewhere")

    def finish() -> None:
        for file in aside.iterdir():
            file.rename(output / file.name)
        claim.unlink()

    timer = threading.Timer(1.5, finish)
    timer.start()
    return timer
