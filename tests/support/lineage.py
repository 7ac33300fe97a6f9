"""A server on loopback that keeps the OpenLineage events it is sent, and what the specification demands of them.

The specification: https://openlineage.io/spec/2-0-2/OpenLineage.json, and the schemas of the facets beside it.
"""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jsonschema

URI = {"type": "string", "format": "uri"}
TEXT = {"type": "string"}


def wanted(**fields: Any) -> dict[str, Any]:
    """A schema of an object that must have these fields."""
    return {"type": "object", "properties": fields, "required": list(fields)}


def facets(**known: dict[str, Any]) -> dict[str, Any]:
    """A schema of facets: each names its producer and its schema; those that are known have fields of their own."""
    base = {"_producer": URI, "_schemaURL": URI}
    named = {name: wanted(**base, **fields) for name, fields in known.items()}
    return {"type": "object", "properties": named, "additionalProperties": wanted(**base)}


COLUMN: dict[str, Any] = wanted(name=TEXT, type=TEXT)
COLUMN["properties"]["fields"] = {"type": "array", "items": {"$ref": "#/$defs/column"}}
COLUMNS = {"type": "array", "items": {"$ref": "#/$defs/column"}, "minItems": 1}
DATASET = {
    "namespace": TEXT,
    "name": TEXT,
    "facets": facets(version={"datasetVersion": TEXT}, schema={"fields": COLUMNS}),
}
OUTPUT = wanted(**DATASET, outputFacets=facets(outputStatistics={"rowCount": {"type": "integer"}}))
RUN = wanted(
    runId={"type": "string", "format": "uuid"},
    facets=facets(errorMessage={"message": TEXT, "programmingLanguage": TEXT}, processing_engine={"version": TEXT}),
)
JOB = wanted(namespace=TEXT, name=TEXT, facets=facets(jobType={"processingType": TEXT, "integration": TEXT}))
EVENT = {
    **wanted(
        eventType={"enum": ["START", "RUNNING", "COMPLETE", "ABORT", "FAIL", "OTHER"]},
        eventTime={"type": "string", "format": "date-time"},
        producer=URI,
        schemaURL={"const": "https://openlineage.io/spec/2-0-2/OpenLineage.json#/$defs/RunEvent"},
        run=RUN,
        job=JOB,
        inputs={"type": "array", "items": wanted(**DATASET)},
        outputs={"type": "array", "items": OUTPUT},
    ),
    "$defs": {"column": COLUMN},
}


def check_event(event: Any) -> None:
    """Check an event.

    Raises:
        jsonschema.ValidationError: it lacks what the specification demands.
    """
    jsonschema.Draft202012Validator(EVENT, format_checker=jsonschema.FormatChecker()).validate(event)


class LineageServer(ThreadingHTTPServer):
    """Keeps the events, once ``answering`` is set; refuses as many requests as ``refusing`` says."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.events: list[dict[str, Any]] = []
        self.refusing, self.refusal = 0, 500
        self.answering = threading.Event()
        self.answering.set()

    @property
    def environment(self) -> dict[str, str]:
        """The standard variables that lead a client here, which sends each event once."""
        names = {"TYPE": "http", "URL": f"http://127.0.0.1:{self.server_port}", "RETRY__TOTAL": "0"}
        return {f"OPENLINEAGE__TRANSPORT__{name}": value for name, value in names.items()}


class Handler(BaseHTTPRequestHandler):
    """Answers requests to send an event."""

    server: LineageServer

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.answering.wait(30)
        refused = self.server.refusing > 0
        if refused:
            self.server.refusing -= 1
        elif self.path == "/api/v1/lineage":
            self.server.events.append(json.loads(content))
        self.send_response(self.server.refusal if refused else 201)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@contextmanager
def serving_lineage() -> Iterator[LineageServer]:
    """A server while the context is open."""
    with LineageServer() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.answering.set()
        server.shutdown()
        thread.join()
