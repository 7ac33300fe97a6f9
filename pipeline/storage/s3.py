"""Open S3 stores; the driver decides which store, region and credentials the workers use."""

import os

from pyarrow import fs

from pipeline.config.sections import StorageConfig

# Standard variables by key of the section ``storage``, in the order in which they are read.
_VARIABLES = {
    "endpoint_url": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
    "region": ("AWS_REGION", "AWS_DEFAULT_REGION"),
}
_CREDENTIALS = {
    "access_key": "AWS_ACCESS_KEY_ID",
    "secret_key": "AWS_SECRET_ACCESS_KEY",
    "session_token": "AWS_SESSION_TOKEN",
}


def resolve_storage(storage: StorageConfig) -> StorageConfig:
    """Return the storage settings with everything that S3 clients of this process take from elsewhere.

    Endpoint and credentials come from variables, the region from variables or the profile. Credentials of a profile or
    a role are left out: every machine has its own.
    """
    found = {key: _read_first(names) for key, names in _VARIABLES.items() if getattr(storage, key) is None}
    if storage.access_key is None and storage.secret_key is None:
        found |= _read_credentials()
    if not (storage.region or found.get("region")):
        found["region"] = fs.S3FileSystem().region  # the profile's, or the SDK's default
    # Validated again, so that credentials become secrets.
    return StorageConfig.model_validate({**dict(storage), **{key: value for key, value in found.items() if value}})


def _read_first(names: tuple[str, ...]) -> str | None:
    return next((value for name in names if (value := os.environ.get(name))), None)


def _read_credentials() -> dict[str, str | None]:
    """Read credentials from variables; a session token alone, or half a pair, is none."""
    found = {key: os.environ.get(name) for key, name in _CREDENTIALS.items()}
    return found if found["access_key"] and found["secret_key"] else {}


def open_s3(storage: StorageConfig) -> fs.S3FileSystem:
    """Open the file system of the store.

    What it takes from variables is passed explicitly: a pickled file system then leads to the same store on machines
    with other variables.
    """
    storage = resolve_storage(storage)
    scheme, _, host = storage.endpoint_url.partition("://") if storage.endpoint_url else ("https", "", "")
    secrets = {key: getattr(storage, key) for key in _CREDENTIALS}
    credentials = {key: secret.get_secret_value() for key, secret in secrets.items() if secret is not None}
    return fs.S3FileSystem(
        **credentials,
        region=storage.region,
        endpoint_override=host or None,
        scheme=scheme,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=4),
        connect_timeout=10,
        request_timeout=60,
        allow_delayed_open=True,  # writes a small file in one PUT instead of three requests
    )
