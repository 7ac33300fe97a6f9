"""The wheel: what it holds, and that its commands work where there is no clone."""

import os
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # setuptools writes beside what it builds
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in tracked.splitlines():
        if name.startswith(("jobs/", "pipeline/")) or name in ("pyproject.toml", "README.md", "LICENSE"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(folder),
        str(source),
    ]
    subprocess.run(command, check=True, timeout=200)
    (file,) = folder.glob("*.whl")
    return file


def test_wheel_holds_every_module_and_its_data(wheel: Path) -> None:
    held = {name for name in ZipFile(wheel).namelist() if name.startswith(("jobs/", "pipeline/"))}
    there = {
        str(file.relative_to(ROOT))
        for package in ("jobs", "pipeline")
        for file in (ROOT / package).rglob("*")
        if file.suffix in (".py", ".yaml", ".css", ".j2", ".typed")
    }
    assert held == there


def test_installed_command_works_without_a_clone(wheel: Path, tmp_path: Path) -> None:
    installed = tmp_path / "installed"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(installed), str(wheel)]
    subprocess.run(install, check=True, timeout=200)
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    called = [str(installed / "bin" / "selfrag"), "report", "--annotations", str(tmp_path / "none")]
    done = subprocess.run(called, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    script = (
        "import jobs.cli, pipeline.decoding.profiles as p; "
        "print(jobs.cli.__file__); print(len(p.hash_built_in_profiles()))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert shown.stdout.splitlines()[0] == str(installed / "jobs" / "cli.py")
