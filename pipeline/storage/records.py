"""Reads small JSON files that a command leaves for its next call."""

from typing import TypeVar

from pydantic import ValidationError

from pipeline.config.loading import Frozen
from pipeline.storage.location import Location

Record = TypeVar("Record", bound=Frozen)


def read_record(kind: type[Record], file: Location) -> Record:
    """Read a JSON file as a model.

    Raises:
        ValueError: it is damaged, or of another version; names it.
        StorageError: it cannot be read.
    """
    try:
        return kind.model_validate_json(file.read())
    except ValidationError as error:
        raise ValueError(
            f"{file.uri}: {error.errors()[0]['msg'].lower()}; choose another output, or replace it with --overwrite"
        ) from None
