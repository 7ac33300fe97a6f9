"""uv's runner of tools, which fetches servers and other programs into environments of their own."""

import os
import shutil
import sys
from pathlib import Path

UVX = shutil.which("uvx", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
