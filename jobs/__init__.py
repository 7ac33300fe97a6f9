"""Commands: each module is one job, run as ``python -m jobs.NAME``."""
