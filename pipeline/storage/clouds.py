"""Open Google's and Azure's object stores."""

import os
import re
from datetime import timedelta
from typing import Any

from pyarrow import fs

from pipeline.config.sections import StorageConfig

# Address of an emulator: https://docs.cloud.google.com/go/docs/reference/cloud.google.com/go/storage/latest
EMULATOR = "STORAGE_EMULATOR_HOST"
# https://learn.microsoft.com/en-us/azure/storage/common/storage-configure-connection-string
CONNECTION = "AZURE_STORAGE_CONNECTION_STRING"
GOOGLE_SCHEMES = ("gs://", "gcs://")
AZURE_SCHEMES = ("abfss://", "abfs://", "az://")
# Seconds for which Google's client itself retries a request.
GOOGLE_RETRIES_S = 10
_ACCOUNT_HOST = re.compile(r"(?P<account>[a-z0-9]{3,24})\.(?:dfs|blob)\.core\.windows\.net")


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

    Without an account, as in ``abfss://CONTAINER/PATH``, it is that of the connection string, whose credentials and
    endpoint are used for its account; other accounts are opened with Azure's default credentials.

    Raises:
        ValueError: the URI or the connection string is wrong.
    """
    place, _, path = uri.partition("://")[2].partition("/")
    container, _, host = place.rpartition("@") if "@" in place else (place, "", "")
    if ":" in container:
        raise ValueError("the URI of a store contains a password, which would be logged; leave it out")
    secret = resolve_azure(storage).azure_connection_string
    known = _parse_connection(secret.get_secret_value()) if secret else {}
    found = _ACCOUNT_HOST.fullmatch(host)
    if not container or bool(host) != bool(found):
        raise ValueError(f"{uri}: expected abfss://CONTAINER@ACCOUNT.dfs.core.windows.net/PATH")
    account = found["account"] if found else known.get("account_name")
    if account is None:
        raise ValueError(f"{uri}: names no account; write abfss://{container}@ACCOUNT.dfs.core.windows.net/PATH")
    options = known if known.get("account_name") == account else {"account_name": account}
    return fs.AzureFileSystem(**options), f"{container}/{path}".rstrip("/")


def _parse_connection(text: str) -> dict[str, str]:
    """Return the arguments of Arrow's file system from a connection string.

    Raises:
        ValueError: it has no account, or neither a key nor a shared access signature.
    """
    found = dict(part.strip().partition("=")[::2] for part in text.split(";") if part.strip())
    given = {"account_name": "AccountName", "account_key": "AccountKey", "sas_token": "SharedAccessSignature"}
    options = {name: found[key] for name, key in given.items() if found.get(key)}
    if "account_name" not in options or len(options) != 2:
        raise ValueError(
            f"storage.azure_connection_string, or {CONNECTION}: expected AccountName=…;AccountKey=… or "
            "AccountName=…;SharedAccessSignature=…"
        )
    if endpoint := found.get("BlobEndpoint"):
        scheme, _, address = endpoint.partition("://")
        authority = address.rstrip("/").removesuffix(f"/{options['account_name']}")
        for service in ("blob", "dfs"):
            options |= {f"{service}_storage_authority": authority, f"{service}_storage_scheme": scheme}
    return options
