"""Run the comparison with other implementations: ``python -m jobs.benchmark``."""

import typer

from jobs.benchmark.compare import benchmark

if __name__ == "__main__":
    typer.run(benchmark)
