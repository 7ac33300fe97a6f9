"""Options that several jobs have."""

from typing import Annotated

import typer

RunFile = Annotated[str | None, typer.Option("--config", help="YAML file of a run, for its section 'storage'.")]
StorageSettings = Annotated[
    list[str] | None,
    typer.Option("--set", help="A storage setting, such as storage.endpoint_url=http://host:9000."),
]
