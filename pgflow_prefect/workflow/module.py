"""The module of the user whose code makes a workflow: where it is, what it is called, and which flows it has."""

from collections.abc import Callable, Mapping
from inspect import cleandoc
from pathlib import Path
from typing import Any

from prefect import Flow

from pgflow_prefect.errors import UsageError
from pgflow_prefect.execution.flow_options import AnyFlow

_MADE_FOR_ROWS = "pgflow_prefect.deployment."
"""The beginning of the names of modules that make workflows without a file. Their docstrings do not describe these."""


class UserModule:
    """The module whose code makes a workflow, or the cells of a notebook."""

    def __init__(self, names: Mapping[str, Any]) -> None:
        """Take the names that the module defines, now and later."""
        self._names = names

    def __reduce__(self) -> tuple[type["UserModule"], tuple[dict[str, Any]]]:
        """Leave out the names: no other process could use them."""
        return UserModule, ({},)

    @property
    def name(self) -> str:
        """The module's name."""
        return str(self._names.get("__name__", "__main__"))

    @property
    def file(self) -> str:
        """The module's file, as Python has it, or its name if it has none."""
        return str(self._names.get("__file__", self.name))

    @property
    def is_interactive(self) -> bool:
        """Whether it is the cells of a notebook, or the lines at a prompt: users run these again."""
        return "__file__" not in self._names

    @property
    def source(self) -> Path | None:
        """Its file; None if it has none, for example in a notebook."""
        file = self._names.get("__file__")
        return Path(file).resolve() if isinstance(file, str) else None

    @property
    def relative_source(self) -> str | None:
        """The file, as a process elsewhere finds it from its own directory; absolute where it is not beneath this."""
        source = self.source
        if source is None:
            return None
        here = Path.cwd()
        return str(source.relative_to(here) if source.is_relative_to(here) else source)

    def find_docstring(self) -> str | None:
        """Return its docstring, which says what its workflow does."""
        if str(self._names.get("__name__")).startswith(_MADE_FOR_ROWS):
            return None
        text = self._names.get("__doc__")
        return cleandoc(text) if isinstance(text, str) else None

    def find_name(self, wanted: object) -> str | None:
        """Return the name of an object in this module."""
        return next((name for name, value in self._names.items() if value is wanted), None)

    def choose_flow(self, function: Callable[..., Any]) -> AnyFlow | None:
        """Return the flow of this function that its runs are to have; None if the module has none.

        Raises:
            UsageError: the module has several, and none is called `flow`.
        """
        made = {name: each for name, each in self._names.items() if isinstance(each, Flow) and each.fn is function}
        if "flow" in made:
            return made["flow"]
        if len({id(each) for each in made.values()}) > 1:
            raise UsageError(
                f"its file has several flows, {' and '.join(made)}: give the name `flow` to the one whose options and "
                "hooks its runs are to have"
            )
        return next(iter(made.values()), None)
