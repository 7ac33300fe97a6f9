"""Send the driver's environment variables to processes on other machines.

A cluster's processes inherit the variables of its own start, not those of a run. Ray's ``runtime_env`` could replace
them, but its agents log what it holds, and it clashes with that of ``ray job submit``. So they travel as an argument.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from pydantic import SecretStr

PREFIXES = ("AWS_", "HF_", "VLLM_", "SELFRAG_")
# Words in the names of variables that are not sent: those of secrets (credentials travel in the settings of storage,
# tokens of the hub below), of roles that a machine has, and of what differs between machines by nature: places on a
# disk, devices, addresses.
_KEPT = re.compile(
    r"(^|_)(KEY|SECRET|TOKEN|PASS|PASSWORD|PASSPHRASE|AUTH|AUTHORIZATION|CREDENTIALS?|CONTAINER|EC2|EXECUTION|LAMBDA|"
    r"METADATA|ROLE|BUNDLE|CACHE|CONFIG|DIR|DIRECTORY|FILE|FOLDER|HOME|PATH|ROOT|TMPDIR|BIND|CORES?|CPU|CUDA|DEVICES?|"
    r"GPU|NIC|NUMA|RANK|ROCM|SOCKET|THREADS|TPU|XPU|HOST|HOSTNAME|INTERFACE|IP|PORT)(_|$)"
)
# Beginnings of values that are paths.
_PATHS = ("/", "~", "./", "../")
HUB_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
# Without them in the driver's environment, workers must not have them either: they lead to another store.
DECISIVE = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REQUEST_CHECKSUM_CALCULATION",
    "AWS_RESPONSE_CHECKSUM_VALIDATION",
)


def is_sendable(name: str, value: str) -> bool:
    """Whether a variable is to hold the same on every machine, and is no secret."""
    return name.startswith(PREFIXES) and not _KEPT.search(name) and not value.startswith(_PATHS)


@dataclass(frozen=True)
class Environment:
    """Variables of the driver.

    Attributes:
        variables: values by name, without secrets.
        tokens: tokens of the Hugging Face hub by the name of their variable.
    """

    variables: Mapping[str, str] = field(default_factory=dict, repr=False)
    tokens: Mapping[str, SecretStr] = field(default_factory=dict)

    @classmethod
    def read(cls, variables: Mapping[str, str] = os.environ) -> "Environment":
        """Read the variables of this process that may be sent."""
        sent = {name: value for name, value in variables.items() if is_sendable(name, value)}
        return cls(sent, {name: SecretStr(variables[name]) for name in HUB_TOKENS if variables.get(name)})

    def apply(self) -> None:
        """Set the variables in this process; libraries that read them must be imported later."""
        for name in DECISIVE:
            if name not in self.variables:
                os.environ.pop(name, None)
        os.environ.update(self.variables)
        os.environ.update({name: token.get_secret_value() for name, token in self.tokens.items()})
