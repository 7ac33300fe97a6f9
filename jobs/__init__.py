"""Commands: each module is one job, run as ``python -m jobs.NAME``."""

from jobs.home import find_home

find_home()
