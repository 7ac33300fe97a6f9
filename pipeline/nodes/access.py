"""Access of the processes of a run to its files, wherever they run, and their environment."""

import pickle
import socket
from dataclasses import dataclass, field, replace
from typing import Generic, Self, TypeVar

from pipeline.config.sections import StorageConfig
from pipeline.nodes.environment import Environment
from pipeline.nodes.places import Output, Refusal, Source

Content = TypeVar("Content")


class NodeAccessError(ValueError):
    """A machine of the cluster cannot read or write what the run needs; the message names machine, path and remedy."""


@dataclass(frozen=True)
class Access:
    """Files that the processes of a run, on any machine, must read and write, and their environment.

    Attributes:
        sources: files to read.
        output: folder to write to; None if the process writes nothing.
        storage: access to object storage, as the driver has resolved it.
        environment: variables of the driver.
        home: Ray's id of the driver's node, which is not tried.
    """

    sources: tuple[Source, ...]
    output: Output | None
    storage: StorageConfig
    environment: Environment
    home: str = ""

    def narrow(self, *options: str) -> Self:
        """Return the access of a process that reads some of the sources and writes nothing."""
        return replace(self, sources=tuple(source for source in self.sources if source.option in options), output=None)

    def prepare(self) -> None:
        """Set the environment of this process, and check once that its machine reads and writes everything.

        A machine may join a cluster while the run goes on.

        Raises:
            NodeAccessError: it does not.
        """
        import ray

        self.environment.apply()
        if self in _PASSED or ray.get_runtime_context().get_node_id() == self.home:
            return
        if refusal := self.find_refusal(ray.get_runtime_context().get_node_id()):
            raise NodeAccessError(refusal.explain(_name_this_node()))
        _PASSED.append(self)

    def find_refusal(self, node: str) -> Refusal | None:
        """Return what this machine, named ``node``, cannot read or write, if anything."""
        refusals = (source.find_refusal(self.storage) for source in self.sources)
        refusal = next(filter(None, refusals), None)
        if refusal is None and self.output is not None:
            refusal = self.output.find_refusal(node, self.storage)
        return refusal


# What this process has checked.
_PASSED: list[Access] = []


@dataclass(frozen=True)
class Packed(Generic[Content]):
    """An argument of a worker, which is unpickled only in the environment of the driver: clients of stores read it.

    Attributes:
        access: environment and checks of the worker; None if nothing is to be set.
    """

    access: Access | None
    content: bytes = field(repr=False)

    @classmethod
    def pack(cls, content: Content, access: Access | None) -> "Packed[Content]":
        """Pickle an argument."""
        return cls(access, pickle.dumps(content))

    def unpack(self) -> Content:
        """Prepare this process and return the argument.

        Raises:
            NodeAccessError: this machine cannot read or write what the run needs.
        """
        if self.access is not None:
            self.access.prepare()
        content: Content = pickle.loads(self.content)  # noqa: S301  pickled by this run's driver
        return content


def _name_this_node() -> str:
    from ray.util import get_node_ip_address

    return f"{socket.gethostname()} ({get_node_ip_address()})"
