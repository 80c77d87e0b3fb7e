"""The colours and signs of a step's states: the same in every picture."""

from typing import NamedTuple

from pgflow_prefect.render.progress import Look


class Paint(NamedTuple):
    """The colours and the sign of a state.

    Attributes:
        fill: of its box, on a light background.
        line: around its box, and of text in its colour, on a light background.
        dark_fill: the same on a dark background.
        dark_line: the same on a dark background.
        sign: for readers who don't see the colour.
    """

    fill: str
    line: str
    dark_fill: str
    dark_line: str
    sign: str


PLAIN = Paint("#f6f8fa", "#6e7781", "#161b22", "#8b949e", "")
"""A step of a workflow without a run."""

PAINTS = {
    Look.COMPLETED: Paint("#dafbe1", "#1a7f37", "#12261e", "#3fb950", "✓"),
    Look.CACHED: Paint("#d2f4f1", "#0f766e", "#0d2926", "#2dd4bf", "↺"),
    Look.RUNNING: Paint("#ddf4ff", "#0969da", "#10233f", "#58a6ff", "▶"),
    Look.RETRYING: Paint("#fff1e5", "#bc4c00", "#2e1a0b", "#f0883e", "↻"),
    Look.ELSEWHERE: Paint("#fbefff", "#8250df", "#231a3b", "#bc8cff", "⇄"),
    Look.PENDING: Paint("#fff8c5", "#9a6700", "#272115", "#d29922", "●"),
    Look.WAITING: Paint("#f6f8fa", "#6e7781", "#161b22", "#8b949e", "○"),
    Look.SKIPPED: Paint("#eaeef2", "#57606a", "#21262d", "#9ea7b3", "⤼"),
    Look.FAILED: Paint("#ffebe9", "#cf222e", "#301416", "#ff7b72", "✗"),
    Look.NOT_RUN: Paint("#fdf3f2", "#b35955", "#241516", "#c77b76", "⊝"),
    Look.CANCELLED: Paint("#f2e5ea", "#a0456b", "#2a1720", "#db8aab", "⊘"),
}
"""By state, in the order of a legend."""
