"""Tells the errors of object stores that a retry may overcome from those that it cannot."""

import re

# Errors that a retry cannot fix: the request, the credentials, the name or the region is wrong.
_PERMANENT = re.compile(
    r"ACCESS_DENIED|INVALID_ACCESS_KEY_ID|INVALID_CLIENT_TOKEN_ID|SIGNATURE_DOES_NOT_MATCH|UNRECOGNIZED_CLIENT|"
    r"EXPIRED_TOKEN|MISSING_AUTHENTICATION_TOKEN|NO_SUCH_|RESOURCE_NOT_FOUND|VALIDATION|INVALID_|"
    r"HTTP status 4(?!08|29)"
)
# Errors of a bucket in another region: the SDK follows no redirections.
_REDIRECTED = re.compile(r"HTTP status 3|PermanentRedirect|AuthorizationHeaderMalformed|while the bucket is located in")
# https://github.com/googleapis/google-cloud-cpp/blob/main/google/cloud/storage/idempotency_policy.h names the codes
# that its client retries.
_GOOGLE = re.compile(r"google::cloud::Status\((UNAVAILABLE|INTERNAL|RESOURCE_EXHAUSTED|DEADLINE_EXCEEDED|ABORTED)\b")
_NO_TOKEN = "Could not create a OAuth2 access token"  # noqa: S105  a message
# Its status follows the code of an error; there is none without a response.
_AZURE = re.compile(r"Azure Error: \[\w*\] (?!4(?!08|29)\d\d)")


def is_transient(error: BaseException) -> bool:
    """Whether an error of an object store is transient: no response, internal error, throttling, broken connection.

    Arrow also raises ``OSError`` for damaged Parquet, whose messages name no store.
    """
    said = str(error)
    if type(error) is not OSError:
        return False
    if _GOOGLE.search(said):
        return _NO_TOKEN not in said
    return _is_transient_of_aws(said) if "AWS Error" in said else bool(_AZURE.search(said))


def _is_transient_of_aws(said: str) -> bool:
    # If the response to a completed upload is lost, its repetition is refused; a retry writes the whole file again.
    completing = "CompleteMultipartUpload" in said and "ACCESS_DENIED" not in said
    return completing or not (_PERMANENT.search(said) or _REDIRECTED.search(said))


def advise(error: BaseException) -> str:
    """Return what to do about an error, to be added to its message; empty if the message says enough."""
    said = str(error)
    if _REDIRECTED.search(said):
        return "; set storage.region to the region of the bucket"
    if _NO_TOKEN in said:
        return "; run gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS"
    if "DefaultAzureCredential" in said or "AuthenticationException" in said:
        return "; run az login, or set storage.azure_connection_string"
    return ""
