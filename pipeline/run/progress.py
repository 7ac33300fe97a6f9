"""Reports the progress of a run on stderr: a live bar on a terminal, plain lines elsewhere."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from pipeline.output.unit_files import UnitSummary

# Minimum seconds between plain lines: short enough to show that the run is alive, long enough for a log of one night.
LINE_INTERVAL = 10.0


class Progress:
    """Shows rows done, rows/s, time left, retrieval rate and errors.

    Args:
        rows: total number of rows.
    """

    def __init__(self, rows: int) -> None:
        self.rows, self.done, self.retrieved, self.errors = rows, 0, 0, 0
        self.started = self.said = time.monotonic()
        console = Console(stderr=True)
        self.bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("rows", total=rows, figures="starting the engine")

    def __enter__(self) -> "Progress":
        self.bar.start()
        self._say("starting engines; progress follows as units finish")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def add(self, unit: UnitSummary) -> None:
        """Count a finished unit and update the display."""
        self.done += unit.rows
        self.retrieved += unit.retrieved
        self.errors += sum(unit.errors.values())
        self.bar.update(self.task, completed=self.done, figures=self.format_figures())
        now = time.monotonic()
        if now - self.said > LINE_INTERVAL or self.done == self.rows:
            self.said = now
            self._say(f"{self.done}/{self.rows} rows, {self.format_figures()}, {self._estimate_left():.0f} s left")

    def _say(self, line: str) -> None:
        """Write a line if there is no bar; it is dated, since one log file may cover several nights."""
        if self.bar.disable:
            sys.stderr.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    def format_figures(self) -> str:
        """Format throughput, retrieval rate and errors so far."""
        rate = self.done / max(time.monotonic() - self.started, 1e-9)
        share = self.retrieved / max(self.done - self.errors, 1)
        return f"{rate:.2f} rows/s, {share:.0%} retrieved, {self.errors} errors"

    def _estimate_left(self) -> float:
        return (self.rows - self.done) * (time.monotonic() - self.started) / max(self.done, 1)
