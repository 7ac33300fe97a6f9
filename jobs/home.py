"""Find a home folder for the libraries; this has to happen before they are imported."""

import getpass
import os
import sys
from pathlib import Path
from typing import NoReturn

from pipeline.config.paths import is_writable

# Files of a read-only home folder that stay in use, by the variable for their place.
KEPT = {
    "AWS_CONFIG_FILE": ".aws/config",
    "AWS_SHARED_CREDENTIALS_FILE": ".aws/credentials",
    "HF_TOKEN_PATH": ".cache/huggingface/token",
}


def find_home() -> None:
    """Use a folder in ``SELFRAG_CACHE`` as the home folder if this user has none that can be written to.

    Hugging Face, vLLM, PyTorch, Triton, Matplotlib and Ray keep files there, and some read ``HOME`` on import. PyTorch
    also asks for the user's name: that of a user without one, as in many containers, is the user id.

    Raises:
        SystemExit: there is no such home folder, and ``SELFRAG_CACHE`` is missing or cannot be written to.
    """
    _name_user()
    home, cache = Path(os.path.expanduser("~")), os.environ.get("SELFRAG_CACHE")  # noqa: PTH111  Path.expanduser raises
    if home.is_absolute() and is_writable(home) and is_writable(home / ".cache"):
        return
    if not cache:
        _refuse(f"the home folder (HOME: {home}) cannot be written to; set SELFRAG_CACHE to a folder that can")
    folder = Path(cache).absolute() / "home"
    if not is_writable(folder):
        _refuse(f"SELFRAG_CACHE={cache} cannot be written to; set it to a folder that can")
    folder.mkdir(parents=True, exist_ok=True)
    for name, file in KEPT.items():
        if os.access(home / file, os.R_OK):
            os.environ.setdefault(name, str(home / file))
    os.environ["HOME"] = str(folder)


def _name_user() -> None:
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = str(os.getuid())


def _refuse(reason: str) -> NoReturn:
    sys.stderr.write(f"error: {reason}\n")
    raise SystemExit(2)
