"""The page of the commands, from what `--help` prints."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from cyclopts import App
from cyclopts.docs.markdown import generate_markdown_docs

from pgflow_prefect.cli.app import COMMANDS, app

_HEAD = """\
# Command line

This page has what `pgflow-prefect COMMAND --help` prints. [Commands](../commands.md) has an overview, and the exit
codes.

Each command also takes `--debug`, which shows tracebacks and Prefect's own messages. `--version` prints the version.
"""


def write_commands() -> str:
    """Return the page: a section for each command."""
    return "\n".join([_HEAD, *(_write_command(name) for name in COMMANDS)])


def _write_command(name: str) -> str:
    command = app[name]
    with _as_its_help(command):
        text = generate_markdown_docs(command, heading_level=2, command_chain=["pgflow-prefect", name])
    return re.sub(r"\n{3,}", "\n\n", text)


@contextmanager
def _as_its_help(command: App) -> Iterator[None]:
    """Show a command's docstring, as its `--help` does, and not its line in the list of commands."""
    former = command.help, command.help_format
    command.help, command.help_format = None, "markdown"
    try:
        yield
    finally:
        command.help, command.help_format = former
