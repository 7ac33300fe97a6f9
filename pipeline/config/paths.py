"""Tell local paths from URIs, and find the path that a ``file:`` URI names."""

import os
import re
from pathlib import Path
from urllib.parse import unquote_to_bytes

# https://www.rfc-editor.org/rfc/rfc3986#section-3.1; one letter would be a folder such as ``c:``.
_SCHEME = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):(?P<slashes>/*)")
# Schemes whose URIs need no host: the client's configuration names the default one
# (https://hadoop.apache.org/docs/stable/hadoop-project-dist/hadoop-common/FileSystemShell.html).
_HOSTLESS = ("hdfs", "viewfs")


def find_local_path(uri: str) -> Path | None:
    """Return the absolute local path that a path or a ``file:`` URI names; None for a URI of another scheme.

    ``file:/x``, ``file:///x`` and ``file://localhost/x`` are ``/x``, and ``%20`` in them is a space
    (https://www.rfc-editor.org/rfc/rfc8089). In a path, ``~`` is the home folder.

    Raises:
        ValueError: a ``file:`` URI has a relative path or another host, a URI has one slash instead of two, or the home
            folder is unknown.
    """
    found = _SCHEME.match(uri)
    if found and found["scheme"].lower() == "file":
        return _decode_path(uri, uri[found.start("slashes") :])
    if found and len(found["slashes"]) == 1:
        slashes = "///" if found["scheme"].lower() in _HOSTLESS else "//"
        raise ValueError(f"{uri}: write {found['scheme']}:{slashes}{uri[found.end() :]}, or ./{uri} for a path")
    return None if "://" in uri else expand_home(uri).absolute()


def expand_home(path: str) -> Path:
    """Return a path with the home folder in place of a leading ``~`` or ``~user``.

    Raises:
        ValueError: the home folder is unknown.
    """
    if not path.startswith("~"):  # Path drops the ./ of a name that begins with ~
        return Path(path)
    try:
        return Path(path).expanduser()
    except RuntimeError:
        home = path.partition("/")[0]
        raise ValueError(
            f"{path}: the home folder {home} is unknown; write the whole path, or ./{path} if the name begins with ~"
        ) from None


def find_local_folder(name: str) -> Path | None:
    """Return the local folder of a model or an encoder; None if the name is not that of a folder, as on the hub."""
    local = find_local_path(name)
    return local if local is not None and local.is_dir() else None


def find_existing(folder: Path) -> Path:
    """Return an absolute local folder, or its nearest parent that exists."""
    # Unlike Path.exists, os.access does not raise an error about a folder in which this user may not look.
    return next(path for path in (folder, *folder.parents) if os.access(path, os.F_OK))


def is_writable(folder: Path) -> bool:
    """Whether this user can write to an absolute local folder, or create it."""
    existing = find_existing(folder)
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def _decode_path(uri: str, rest: str) -> Path:
    host, path = "", rest
    if rest.startswith("//"):
        host, slash, path = rest[2:].partition("/")
        path = slash + path
    if host not in ("", "localhost"):
        raise ValueError(
            f"{uri}: {host!r} is taken as the name of a host; write file:///{host}{path}, or the path alone"
        )
    if not path.startswith("/"):
        raise ValueError(f"{uri}: the path of a file: URI begins with /; write file:///…, or the path alone")
    return Path(os.fsdecode(unquote_to_bytes(path)))
