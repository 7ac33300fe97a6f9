"""Find the engine's fastest settings for a run, on a sample of its own rows.

``python -m jobs.tune --config run.yaml [--rows 256]``

Each trial is a run of its own with one actor. Settings that change few answers are kept, and the next ones are tried on
top of them.
"""

import dataclasses
import json
import logging
from collections.abc import Sequence
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from jobs.annotate import ConfigFile, Day, Index, Model, Queries, Settings
from jobs.common import checking, fail, start_logging, working
from jobs.shell import run
from pipeline.config.run import RunConfig, load_config
from pipeline.config.sections import ExecutionConfig, SampleConfig
from pipeline.nodes.access import NodeAccessError
from pipeline.queries.division import FEWEST_UNIT_ROWS
from pipeline.storage.lease import Lease, OutputInUseError
from pipeline.storage.location import Location, check_writable, is_hidden, locate
from pipeline.tuning.knobs import KNOBS, Knob, choose_knobs, leave_out_gpu_knobs
from pipeline.tuning.search import CONFIGURED, MOST_SHIFT, EngineTrial, Search, Tuned, list_first_trials
from pipeline.tuning.trials import Trials, format_settings

NAMES = ", ".join(knob.name for knob in KNOBS)


def tune(
    config: ConfigFile = None,
    queries: Queries = None,
    index: Index = None,
    model: Model = None,
    output: Annotated[
        str | None, typer.Option(help="Folder for the trials; by default _NAME-tuning beside the run's output NAME.")
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Rows in each trial; by default as many as an actor has in flight.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the rows.")] = 0,
    only: Annotated[list[str] | None, typer.Option(help=f"Try only this; repeatable: {NAMES}.")] = None,
    max_changed: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the answers that a setting may change.")
    ] = 0.05,
    settings: Settings = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only check everything and list the trials.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite/--resume", help="Replace earlier trials, or go on with them (the default).")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    day: Day = None,
) -> None:
    """Find the engine's fastest settings for a run, on a sample of its own rows.

    Exit status: 0 measured, 1 failed, 2 bad usage.
    """
    start_logging(logging.WARNING, progress=["pipeline.tuning.trials"], timestamps=True)
    with checking(RuntimeError):
        flags = {"queries": queries, "index": index, "output": output, "model.name": model}
        run_config = load_config(config, settings or [], flags, day and day.date())
        place = choose_folder(run_config, output)
        knobs = choose_knobs(only or [], run_config.model.engine)
        sample = SampleConfig(rows=rows or count_in_flight(run_config.execution), seed=seed)
        trials = Trials.prepare(run_config, place, sample, overwrite)
        if not trials.resources.gpus:
            knobs = leave_out_gpu_knobs(knobs, only or [])
        if not knobs:
            raise ValueError("there is nothing to try: every value is configured already")
    if dry_run:
        print_plan(trials, knobs)
        return
    hint = "the tuning failed; rerun the same command to continue"
    bad_input = (OutputInUseError, NodeAccessError)
    with working(hint, bad_input=bad_input, resumable=True, overwrite=overwrite), Lease(place):
        trials.begin()
        tuned = Search(trials.measure, max_changed).run(knobs)
    if as_json:
        typer.echo(json.dumps(to_record(trials, tuned)))
    else:
        print_outcome(trials.asked, tuned, max_changed)
    if all(trial.rate is None and trial.stopped_after is None for trial in trials.asked[CONFIGURED:]):
        fail(f"none of the settings could be measured: {trials.asked[-1].problem}", 1)


def count_in_flight(execution: ExecutionConfig) -> int:
    """Return the number of rows that an actor has in flight."""
    return execution.units_in_flight * (execution.unit_rows or FEWEST_UNIT_ROWS)


def to_record(trials: Trials, tuned: Tuned) -> dict[str, Any]:
    """Return the outcome as plain values for JSON."""
    named = {"refused": tuned.refused, "unconfirmed": tuned.unconfirmed}
    return {
        "output": trials.folder.uri,
        "rows": trials.plan.queries.rows,
        **dataclasses.asdict(tuned),
        **{name: trial and trial.model_dump() for name, trial in named.items()},
        "trials": [trial.model_dump() for trial in trials.asked],
    }


def choose_folder(config: RunConfig, output: str | None) -> Location:
    """Return the folder for the trials, in which no run looks for answers.

    Raises:
        ValueError: the folder is in that of earlier sets; or none is given, and the run's output is a bucket.
        StorageError: the folder cannot be written.
    """
    above, slash, name = config.output.rstrip("/").rpartition("/")
    if output is None and (not name or above.endswith(":/")):
        raise ValueError(f"there is nothing beside {config.output}; give a folder for the trials (--output)")
    folder = locate(output or f"{above}{slash}_{name}-tuning", config.storage)
    if config.skip_annotated is not None:
        earlier = f"{locate(config.skip_annotated, config.storage).path.rstrip('/')}/"
        inside = f"{folder.path}/".removeprefix(earlier)
        if f"{folder.path}/".startswith(earlier) and not is_hidden(inside):
            raise ValueError(
                f"--output {folder.uri}: is in the folder of skip_annotated, where answers of trials would count as "
                "those of runs; choose another, or a name that begins with _"
            )
    check_writable(folder)
    return folder


def print_plan(trials: Trials, knobs: list[Knob]) -> None:
    """Print the plan of the first trial, and the settings of the others."""
    for line in [*trials.plan.describe(), *trials.resources.describe()]:
        typer.echo(line, err=True)
    for tried in list_first_trials(knobs):
        typer.echo(f"trial    {format_settings(tried)}", err=True)
    typer.echo("nothing was written and no engine started (--dry-run)", err=True)


def print_outcome(trials: Sequence[EngineTrial], tuned: Tuned, max_changed: float) -> None:
    """Print a table of the trials, and the YAML of the best settings."""
    Console().print(build_trials_table(trials))
    for trial in trials:
        if trial.problem:
            typer.echo(f"trial {trial.number}, {format_settings(trial.settings)}: {trial.problem}")
    if tuned.refused:
        typer.echo(explain_refusal(tuned.refused, max_changed))
    if tuned.unconfirmed:
        typer.echo(
            f"not chosen: {format_settings(tuned.unconfirmed.settings)} was faster once ({tuned.unconfirmed.rate:.2f} "
            "queries/s), but not when it was measured again"
        )
    if not tuned.settings:
        typer.echo(f"keep the configured settings: none that may be chosen is faster by more than {tuned.margin:.0%}")
        return
    typer.echo(
        f"{tuned.rate / tuned.configured:.2f} times as fast as configured ({tuned.rate:.2f} instead of "
        f"{tuned.configured:.2f} queries/s of an actor), with {tuned.changed:.1%} of the answers changed:"
    )
    typer.echo(yaml.safe_dump({"model": {"engine": tuned.settings}}, sort_keys=False), nl=False)


def explain_refusal(refused: EngineTrial, max_changed: float) -> str:
    """Return a line that explains why the settings of a trial are not chosen, although they are faster."""
    why = f"changes {refused.changed:.1%} of the answers, more than --max-changed {max_changed:g} allows"
    if refused.shift > MOST_SHIFT:
        why = f"shifts the scores of the same answers by {refused.shift:.2f}, so that these cannot be trusted"
    return f"not chosen: {format_settings(refused.settings)} is faster ({refused.rate:.2f} queries/s), but {why}"


def build_trials_table(trials: Sequence[EngineTrial]) -> Table:
    """Return a table with a line for each trial."""
    table = Table(title=f"{len(trials)} trials")
    for heading in ("", "settings", "queries/s", "changed", "shift of scores"):
        table.add_column(heading, justify="left" if heading == "settings" else "right")
    for trial in trials:
        figures = ["–"] * 3
        if trial.rate is not None:
            figures = [f"{trial.rate:.2f}", f"{trial.changed:.1%}", f"{trial.shift:.3f}"]
        table.add_row(str(trial.number), format_settings(trial.settings), *figures)
    return table


if __name__ == "__main__":
    run(tune)
