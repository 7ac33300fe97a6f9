"""Sends notifications of a failed run: runs a command, calls a webhook, or both (``on_failure``)."""

import json
import logging
import subprocess
import urllib.request

from tenacity import Retrying, stop_after_attempt, wait_exponential

from pipeline.config.run import RunConfig
from pipeline.config.sections import OnFailure

log = logging.getLogger(__name__)

COMMAND_SECONDS, WEBHOOK_SECONDS = 60, 10


def notify_failure(config: RunConfig, status: int, message: str) -> None:
    """Run the command and call the webhook; if one fails, log a warning, since the exit status reports the failed run.

    Both receive the same JSON object, the command on its stdin: ``text`` (one line, which Slack and similar services
    display), ``output``, ``status`` and ``error``.

    Args:
        status: exit status of the run.
        message: the error, in one line.
    """
    record = {"output": config.output, "status": status, "error": message}
    record["text"] = f"selfrag-batch: {config.output} failed with status {status}: {message}"
    content = json.dumps(record).encode()
    for way in (_run, _post):
        try:
            way(config.on_failure, content)
        except Exception as error:  # noqa: BLE001  no error here may change the run's exit status
            # Without the URL and the command's arguments, which may contain secrets.
            log.warning("on_failure: notification failed: %s", _describe_error(error))


def _describe_error(error: Exception) -> str:
    if isinstance(error, FileNotFoundError | PermissionError):
        return f"{type(error).__name__}: {error.filename}"
    return type(error).__name__


def _run(whom: OnFailure, content: bytes) -> None:
    if whom.command:
        # The user's own configuration sets the command.
        subprocess.run(whom.command, input=content, timeout=COMMAND_SECONDS, check=True)  # noqa: S603


def _post(whom: OnFailure, content: bytes) -> None:
    if whom.webhook is None:
        return
    request = urllib.request.Request(  # noqa: S310  the configuration accepts http and https only
        whom.webhook.get_secret_value(), content, {"Content-Type": "application/json"}
    )
    for attempt in Retrying(stop=stop_after_attempt(3), wait=wait_exponential(1), reraise=True):
        with attempt, urllib.request.urlopen(request, timeout=WEBHOOK_SECONDS):  # noqa: S310
            pass
