"""Commands of users without a home folder of their own, such as those of many containers."""

import getpass
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.home import find_home
from tests.support.folders import make_read_only

# A user without an entry in the password database, that may read every file but write none of others.
STRANGER = (
    "setpriv --reuid 54321 --regid 54321 --clear-groups --inh-caps +dac_read_search --ambient-caps +dac_read_search"
)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Stands for that of the process."""
    variables = {"HOME": "/home/me", "USER": "me"}
    monkeypatch.setattr("jobs.home.os.environ", variables)
    monkeypatch.setattr("jobs.home.os.path.expanduser", lambda _: variables.get("HOME", "~"))
    return variables


@pytest.mark.parametrize("home", ["present", "absent/but/allowed"])
def test_home_that_can_be_written_to_is_kept(tmp_path: Path, environment: dict[str, str], home: str) -> None:
    (tmp_path / "present").mkdir()
    environment |= {"HOME": str(tmp_path / home), "SELFRAG_CACHE": str(tmp_path / "cache")}
    before = dict(environment)
    find_home()
    assert environment == before
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("home", [None, "", "~", "relative", "/dev/null", "/dev/null/me", "{}/locked", "{}/locked/me"])
def test_cache_folder_replaces_an_unusable_home(
    tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, home: str | None
) -> None:
    (tmp_path / "locked").mkdir()
    make_read_only(tmp_path / "locked", monkeypatch)
    del environment["HOME"]
    if home is not None:
        environment["HOME"] = home.format(tmp_path)
    environment["SELFRAG_CACHE"] = str(tmp_path / "new" / "cache")
    find_home()
    assert environment["HOME"] == str(tmp_path / "new" / "cache" / "home")
    assert Path(environment["HOME"]).is_dir()


def test_home_with_a_cache_folder_of_another_user_is_replaced(
    tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".cache").mkdir()
    make_read_only(tmp_path / ".cache", monkeypatch)
    environment |= {"HOME": str(tmp_path), "SELFRAG_CACHE": str(tmp_path / "mine")}
    find_home()
    assert environment["HOME"] == str(tmp_path / "mine" / "home")


def test_credentials_in_a_read_only_home_stay_in_use(
    tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    for file in (".aws/credentials", ".cache/huggingface/token"):
        (home / file).parent.mkdir(parents=True)
        (home / file).touch()
    make_read_only(home, monkeypatch)
    environment |= {"HOME": str(home), "SELFRAG_CACHE": str(tmp_path / "cache"), "HF_TOKEN_PATH": "/run/token"}
    find_home()
    assert environment["AWS_SHARED_CREDENTIALS_FILE"] == str(home / ".aws/credentials")
    assert "AWS_CONFIG_FILE" not in environment
    assert environment["HF_TOKEN_PATH"] == "/run/token"


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        (
            None,
            "error: the home folder (HOME: /dev/null) cannot be written to; set SELFRAG_CACHE to a folder that can\n",
        ),
        ("", "error: the home folder (HOME: /dev/null) cannot be written to; set SELFRAG_CACHE to a folder that can\n"),
        ("/dev/null", "error: SELFRAG_CACHE=/dev/null cannot be written to; set it to a folder that can\n"),
        ("/dev/null/a", "error: SELFRAG_CACHE=/dev/null/a cannot be written to; set it to a folder that can\n"),
    ],
)
def test_one_line_asks_for_the_cache_folder(
    environment: dict[str, str], capsys: pytest.CaptureFixture[str], cache: str | None, message: str
) -> None:
    environment["HOME"] = "/dev/null"
    if cache is not None:
        environment["SELFRAG_CACHE"] = cache
    with pytest.raises(SystemExit) as caught:
        find_home()
    assert caught.value.code == 2
    assert capsys.readouterr().err == message


@pytest.mark.parametrize("error", [KeyError, OSError])
def test_user_without_a_name_is_named_by_the_user_id(
    tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def fail() -> str:
        raise error

    monkeypatch.setattr(getpass, "getuser", fail)
    environment["HOME"] = str(tmp_path)
    find_home()
    assert environment["USER"] == str(os.getuid())


@pytest.mark.skipif(os.getuid() != 0 or shutil.which("setpriv") is None, reason="takes root to become another user")
@pytest.mark.parametrize("home", [[], ["HOME=/nonexistent"], ["HOME=/"]])
def test_commands_run_for_a_user_with_nothing_but_a_cache_folder(tmp_path: Path, home: list[str]) -> None:
    for folder in (tmp_path, *tmp_path.parents[:-1]):
        folder.chmod(folder.stat().st_mode | 0o755)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    empty = [*STRANGER.split(), "env", "-i", f"PATH={os.environ['PATH']}", *home]
    command = [sys.executable, "-m", "jobs.evaluate", "--annotations", str(tmp_path)]
    bare = subprocess.run([*empty, *command], capture_output=True, text=True, check=False)
    assert (bare.returncode, bare.stderr.count("\n")) == (2, 1)
    assert "set SELFRAG_CACHE to a folder that can" in bare.stderr
    cached = subprocess.run(
        [*empty, f"SELFRAG_CACHE={tmp_path}/cache", *command], capture_output=True, text=True, check=False
    )
    assert (cached.returncode, cached.stderr.count("\n")) == (2, 1)
    assert "no Parquet files" in cached.stderr
