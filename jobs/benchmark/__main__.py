"""Run the comparison with other implementations: ``python -m jobs.benchmark``."""

from jobs.benchmark.compare import benchmark
from jobs.shell import run

if __name__ == "__main__":
    run(benchmark)
