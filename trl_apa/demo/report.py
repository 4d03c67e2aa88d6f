"""What the demo shows while it runs: progress bars and a live table in a terminal, plain lines elsewhere."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from .supervised import Tick


# Name in the metrics, heading in the live table, meaning in the final one, format.
METRICS = (
    ("proxy_reward", "proxy reward", "proxy reward (learned; deviations of SFT)", "{:+.2f}"),
    ("gold_reward", "gold reward", "gold reward (true; 3 is the best)", "{:+.2f}"),
    ("kl", "KL", "KL to the initial model, nats/response", "{:.2f}"),
    ("entropy", "entropy", "entropy, nats/token", "{:.2f}"),
    ("distinct", "distinct", "distinct answers", "{:.0%}"),
    ("length", "tokens", "length, tokens", "{:.1f}"),
    ("eos_share", "ended", "ended by itself", "{:.0%}"),
)
VISIBLE_ROWS = 12
PLAIN_EVERY = 5


class Report:
    """Writes to `console`, and keeps the seconds that each stage took in `seconds`.

    Args:
        console: to write to.
        metrics: of each, its name, its heading in the live table, its meaning in the final one, and its format.
    """

    def __init__(self, console: Console, metrics: Sequence[tuple[str, str, str, str]] = METRICS):
        self.console = console
        self.metrics = metrics
        self.seconds: dict[str, float] = {}

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage."""
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start

    @contextmanager
    def training(self, title: str, total: int) -> Iterator[Tick]:
        """A stage with a progress bar; yields the function to call with steps done and the loss."""
        progress = self._progress()
        task = progress.add_task(title, total=total, note="")
        last_loss = None

        def tick(done: int, loss: float | None) -> None:
            nonlocal last_loss
            last_loss = last_loss if loss is None else loss
            note = "" if last_loss is None else f"loss {last_loss:.2f}"
            progress.update(task, completed=done, note=note)

        with self.stage(title):
            if self.console.is_terminal:
                with progress:
                    yield tick
            else:
                yield tick
        if not self.console.is_terminal:
            loss = "" if last_loss is None else f", loss {last_loss:.2f}"
            self.say(f"{title}: {total} steps in {self.seconds[title]:.1f} s{loss}")

    @contextmanager
    def iterations(self, title: str, total: int) -> Iterator["IterationTable"]:
        """The reinforcement-learning stage, with its live table."""
        progress = self._progress()
        table = IterationTable(self, progress, progress.add_task(title, total=total, note=""), total)
        with self.stage(title):
            if self.console.is_terminal:
                with Live(table.render(), console=self.console, refresh_per_second=4) as live:
                    table.live = live
                    yield table
            else:
                yield table
        if not self.console.is_terminal:
            self.say(f"{title}: {total} iterations in {self.seconds[title]:.1f} s")

    def summary(self, before: dict[str, float], after: dict[str, float], title: str, before_heading: str) -> None:
        """The table of means before and after."""
        table = Table(title=title, title_justify="left")
        for heading in ("", before_heading, "after"):
            table.add_column(heading, justify="left" if heading == "" else "right")
        for name, _, meaning, form in self.metrics:
            table.add_row(meaning, form.format(before[name]), form.format(after[name]))
        self.console.print(table)

    def samples(self, rows: Sequence[tuple[str, str, float, str, float]]) -> None:
        """Answers to the same questions before and after, each with its gold reward."""
        for prompt, before, gold_before, after, gold_after in rows:
            self.say(f"\n[bold]{readable(prompt.removesuffix(' answer :'))}[/bold]")
            self.say(f"  before ({gold_before:+.2f})  {readable(before)}")
            self.say(f"  after  ({gold_after:+.2f})  {readable(after)}")
        self.say("")

    def side_by_side(self, rows: Sequence[tuple[str, str, float, str, float]]) -> None:
        """Sentences before and after in two columns, each with its reward."""
        table = Table(title="Held-out sentences", title_justify="left", show_lines=True)
        for heading in ("before", "after"):
            table.add_column(heading, ratio=1)
        for prompt, before, reward_before, after, reward_after in rows:
            pairs = ((before, reward_before), (after, reward_after))
            table.add_row(*(f"{escape(prompt)}[bold]{escape(text)}[/bold] ({reward:+.2f})" for text, reward in pairs))
        self.console.print(table)

    def _progress(self) -> Progress:
        return Progress(
            TextColumn("{task.description:<28}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
        )


class IterationTable:
    """The latest iterations as a table that redraws itself, or as a line every few iterations."""

    def __init__(self, report: Report, progress: Progress, task: TaskID, total: int):
        self.report = report
        self.progress = progress
        self.task = task
        self.total = total
        self.rows: list[list[str]] = []
        self.live: Live | None = None

    def add(self, iteration: int, metrics: dict[str, float]) -> None:
        cells = [form.format(metrics[name]) for name, _, _, form in self.report.metrics]
        self.rows.append([str(iteration), *cells])
        self.progress.update(self.task, completed=iteration)
        if self.live is not None:
            self.live.update(self.render())
        elif iteration % PLAIN_EVERY == 0 or iteration in (1, self.total):
            values = ", ".join(
                f"{heading} {cell}" for (_, heading, _, _), cell in zip(self.report.metrics, cells, strict=True)
            )
            self.report.say(f"iteration {iteration}/{self.total}: {values}")

    def render(self) -> Group:
        table = Table()
        for heading in ("iteration", *(heading for _, heading, _, _ in self.report.metrics)):
            table.add_column(heading, justify="right")
        for row in self.rows[-VISIBLE_ROWS:]:
            table.add_row(*row)
        return Group(table, self.progress)


def readable(text: str) -> str:
    """The grammar's spaced words as ordinary punctuation."""
    for mark in ",.?!:":
        text = text.replace(f" {mark}", mark)
    return text
