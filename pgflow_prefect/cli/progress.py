"""Shows a run while it executes: a live view on a terminal, a line for each change elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from pgflow_prefect.cli.console import STYLES, out, print_cells
from pgflow_prefect.state_names import DONE

if TYPE_CHECKING:
    from rich.console import RenderableType

ROWS = 15
"""The live view shows this many steps: those that changed last."""


class View(Protocol):
    """A view that shows a run."""

    def observe(self, step_slug: str, state_name: str) -> None:
        """Note that a step entered a state."""

    @contextmanager
    def show(self, steps: int) -> Iterator[None]:
        """Show the run, which has so many steps, until the block ends."""


def make_view(*, quiet: bool) -> View:
    """Return the view that fits where standard output goes."""
    if quiet:
        return QuietView()
    return LiveView() if out.is_terminal else PlainView()


class QuietView:
    """Shows nothing."""

    def observe(self, step_slug: str, state_name: str) -> None:
        """Note that a step entered a state."""

    @contextmanager
    def show(self, steps: int) -> Iterator[None]:
        """Show nothing."""
        yield


class PlainView(QuietView):
    """A line for each change."""

    def observe(self, step_slug: str, state_name: str) -> None:
        """Print the change."""
        print_cells((step_slug, state_name))  # rich would turn the tab into spaces
        sys.stdout.flush()


class LiveView:
    """A bar of the steps that are done, over the latest changes."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._states: dict[str, str] = {}
        self._done = 0
        self._bar = Progress(
            BarColumn(complete_style="cyan"),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeElapsedColumn(),
            console=out,
        )
        self._task = self._bar.add_task("steps", total=None)

    def observe(self, step_slug: str, state_name: str) -> None:
        """Note the change for the next picture."""
        self._states.pop(step_slug, None)  # the latest change comes last
        self._states[step_slug] = state_name
        if state_name in DONE:
            self._done += 1
            self._bar.update(self._task, completed=self._done)

    @contextmanager
    def show(self, steps: int) -> Iterator[None]:
        """Draw, a few times a second, until the block ends."""
        from rich.live import Live

        self._bar.update(self._task, total=steps)
        with Live(console=out, get_renderable=self._draw, refresh_per_second=8):
            yield
            # The command prints the run's duration next. The bar's own time is that of the picture.
            self._bar.columns = self._bar.columns[:-1]

    def _draw(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        latest = list(self._states.items())[-ROWS:]
        width = max((len(slug) for slug, _ in latest), default=0)
        lines = [Text.assemble(slug.ljust(width), "  ", (name, _style(name))) for slug, name in latest]
        return Group(*lines, self._bar)


def _style(state_name: str) -> str:
    return STYLES["completed"] if state_name in DONE else STYLES.get(state_name.lower(), "red")
