"""Open Google's and Azure's object stores."""

import os
import re
from datetime import timedelta
from functools import cache
from typing import Any

from pyarrow import fs

from pipeline.config.sections import StorageConfig

GOOGLE_SCHEMES = ("gs://", "gcs://")
AZURE_SCHEMES = ("abfss://", "abfs://", "az://")
# Address of an emulator: https://docs.cloud.google.com/go/docs/reference/cloud.google.com/go/storage/latest
EMULATOR = "STORAGE_EMULATOR_HOST"
# https://learn.microsoft.com/en-us/azure/storage/common/storage-configure-connection-string
CONNECTION = "AZURE_STORAGE_CONNECTION_STRING"
# Seconds for which Google's client itself retries a request.
GOOGLE_RETRIES_S = 10
# Azure's public cloud; national ones have others.
_PUBLIC = "core.windows.net"
_FORM = "abfss://CONTAINER@ACCOUNT.dfs.core.windows.net/PATH"
_CONTAINER = re.compile(r"[a-z0-9$-]{3,63}")
_ACCOUNT_HOST = re.compile(r"(?P<account>[a-z0-9]{3,24})\.(?:dfs|blob)\.(?P<suffix>core\.[a-z0-9.-]+)")


def open_google(uri: str) -> tuple[fs.GcsFileSystem, str]:
    """Open the store of ``gs://bucket/path``, with Google's default credentials; return it with the path.

    Raises:
        ValueError: the URI has no bucket.
    """
    path = uri.partition("://")[2].rstrip("/")
    if not path or path.startswith("/"):
        raise ValueError(f"{uri}: expected gs://BUCKET/PATH")
    options: dict[str, Any] = {"retry_time_limit": timedelta(seconds=GOOGLE_RETRIES_S)}
    if emulator := os.environ.get(EMULATOR):
        scheme, _, host = emulator.rpartition("://")
        options |= {"anonymous": True, "scheme": scheme or "http", "endpoint_override": host.rstrip("/")}
    return fs.GcsFileSystem(**options), path


def resolve_azure(storage: StorageConfig) -> StorageConfig:
    """Return the storage settings with the connection string of this process, if it has one."""
    if storage.azure_connection_string is not None or not (found := os.environ.get(CONNECTION)):
        return storage
    return StorageConfig.model_validate({**dict(storage), "azure_connection_string": found})


def open_azure(uri: str, storage: StorageConfig) -> tuple[fs.AzureFileSystem, str]:
    """Open the store of ``abfss://CONTAINER@ACCOUNT.dfs.core.windows.net/PATH``; return it with ``CONTAINER/PATH``.

    Without an account, as in ``abfss://CONTAINER/PATH``, it is that of the connection string, whose key and endpoint
    are used for its account; other accounts are opened with Azure's default credentials.

    Raises:
        ValueError: the URI or the connection string is wrong.
        OSError, pyarrow.ArrowException: there are no default credentials.
    """
    place, _, path = uri.partition("://")[2].partition("/")
    container, _, host = place.partition("@")
    found = _ACCOUNT_HOST.fullmatch(host)
    if not _CONTAINER.fullmatch(container) or bool(host) != bool(found):
        raise ValueError(f"{uri}: expected {_FORM}")
    secret = resolve_azure(storage).azure_connection_string
    known = _parse_connection(secret.get_secret_value()) if secret else {}
    account = found["account"] if found else known.get("account_name")
    if account is None:
        raise ValueError(f"{uri}: names no account; write abfss://{container}@ACCOUNT.dfs.core.windows.net/PATH")
    if account == known.get("account_name"):
        options = known
    else:
        options = {"account_name": account, **_name_services(found["suffix"] if found else _PUBLIC)}
        _try_default_credentials(container, tuple(options.items()))
    return fs.AzureFileSystem(**options), f"{container}/{path}".rstrip("/")


@cache
def _try_default_credentials(container: str, options: tuple[tuple[str, str], ...]) -> None:
    """Ask for a file, which need not exist; without credentials, some of Arrow's functions end the process."""
    fs.AzureFileSystem(**dict(options)).get_file_info(f"{container}/_selfrag")


def _name_services(suffix: str) -> dict[str, str]:
    return {f"{service}_storage_authority": f".{service}.{suffix}" for service in ("blob", "dfs")}


def _parse_connection(text: str) -> dict[str, str]:
    """Return the arguments of Arrow's file system from a connection string.

    Shared access signatures are refused, since Arrow repeats them in the messages of errors.

    Raises:
        ValueError: it has no account or key, or its endpoint is of another form.
    """
    found = dict(part.strip().partition("=")[::2] for part in text.split(";") if part.strip())
    account, key = found.get("AccountName"), found.get("AccountKey")
    if not (account and key):
        raise ValueError(f"storage.azure_connection_string, or {CONNECTION}: expected AccountName=…;AccountKey=…")
    options = {"account_name": account, "account_key": key}
    if (endpoint := found.get("BlobEndpoint")) is None:
        return options | _name_services(found.get("EndpointSuffix", _PUBLIC))
    scheme, _, address = endpoint.rstrip("/").partition("://")
    host, _, path = address.partition("/")
    if (service := _ACCOUNT_HOST.fullmatch(host)) and service["account"] == account and not path:
        return options | _name_services(service["suffix"])
    if path != account:
        raise ValueError(
            f"storage.azure_connection_string, or {CONNECTION}: expected BlobEndpoint=https://{account}.blob.{_PUBLIC} "
            f"or, of an emulator, BlobEndpoint=http://HOST/{account}"
        )
    for name in ("blob", "dfs"):
        options |= {f"{name}_storage_authority": host, f"{name}_storage_scheme": scheme}
    return options
