"""The locks in infra/locks pin everything that pyproject.toml asks for, and belong to no particular package index."""

import tomllib
from pathlib import Path
from typing import cast

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def machine(python: str) -> dict[str, str]:
    environment = cast("dict[str, str]", default_environment())
    environment.update({"python_version": python, "python_full_version": f"{python}.0", "platform_machine": "x86_64"})
    return environment


def pins(extra: str, python: str) -> dict[str, str]:
    """The version that the lock gives each package on Linux with this Python."""
    lines = (ROOT / "infra" / "locks" / f"{extra}.txt").read_text().splitlines()
    wanted = [Requirement(line) for line in lines]
    taken = [item for item in wanted if item.marker is None or item.marker.evaluate(machine(python))]
    assert len({canonicalize_name(item.name) for item in taken}) == len(taken)
    return {canonicalize_name(item.name): str(item.specifier).removeprefix("==") for item in taken}


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
@pytest.mark.parametrize("extra", ["cpu", "gpu"])
def test_every_dependency_is_pinned_to_an_allowed_version(extra: str, python: str) -> None:
    locked = pins(extra, python)
    asked = [
        *PROJECT["dependencies"],
        *PROJECT["optional-dependencies"][extra],
        *PROJECT["optional-dependencies"]["dev"],
    ]
    for requirement in map(Requirement, asked):
        assert locked[canonicalize_name(requirement.name)] in requirement.specifier, requirement


@pytest.mark.parametrize("extra", ["cpu", "gpu"])
def test_locks_name_versions_without_urls_or_options(extra: str) -> None:
    text = (ROOT / "infra" / "locks" / f"{extra}.txt").read_text()
    assert "://" not in text
    assert " @ " not in text
    assert "--" not in text
