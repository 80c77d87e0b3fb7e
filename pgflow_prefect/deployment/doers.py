"""Describes who does each step of a workflow: a row, a function of a file, or no handler but a stub."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from pgflow_prefect.bindings import Kind
from pgflow_prefect.definitions.model import ChildRules
from pgflow_prefect.handlers.python import PythonHandler
from pgflow_prefect.models import StepBinding
from pgflow_prefect.workflow import Workflow


@dataclass(frozen=True)
class Doer:
    """Who does a step.

    Attributes:
        text: in words.
        options: of the row that binds the step.
        function: the function in Python that does the step, or its stub.
        file: the function's file, relative to the working directory if the file is beneath it.
        line: the function's first line.
        is_stub: the function has no code yet; until then the step is external.
    """

    text: str
    options: str = ""
    function: str | None = None
    file: str | None = None
    line: int | None = None
    is_stub: bool = False

    @property
    def place(self) -> str:
        """The function, and where it is."""
        return f"{self.function} in {self.file}:{self.line}"

    def to_json(self) -> dict[str, object]:
        """Return the JSON for scripts."""
        return {
            "done_by": self.text,
            "function": self.function,
            "file": self.file,
            "line": self.line,
            "stub": self.is_stub,
        }


def describe_doer(slug: str, row: StepBinding | None, workflow: Workflow | None, source: str) -> Doer:
    """Return who does a step.

    Args:
        slug: the step.
        row: its binding by a row, which wins over Python.
        workflow: its handlers; None if they are not here.
        source: their file or module.
    """
    known = workflow.find_function(slug) if workflow is not None else None
    options = ", ".join(f"{name}={value}" for name, value in row.options.items()) if row is not None else ""
    if row is not None and row.kind != Kind.PYTHON:
        return Doer(" ".join(filter(None, [row.kind, row.target])), options)
    if workflow is None:
        return Doer(str(row.kind) if row is not None else "the file of handlers, else an external worker", options)
    binding = workflow.bindings.get(slug)
    if row is None and binding is not None:
        return Doer(f"{binding}, as {source} says", options)
    if known is None and row is None:
        return Doer(f"external: {source} has no handler of it", options)
    if known is None:
        return Doer(f"python, and {source} has no handler of it", options)
    found = Doer("", options, *locate_function(known), is_stub=known.unimplemented)
    if found.is_stub:
        kind = "python" if row is not None else "external"
        text = f"{kind}: {found.place} is still a stub"
    else:
        text = f"python {found.place}"
    return Doer(text, options, found.function, found.file, found.line, found.is_stub)


def describe_doers(
    order: list[str],
    rows: Mapping[str, StepBinding],
    workflow: Workflow | None,
    source: str,
    children: Mapping[str, ChildRules] = MappingProxyType({}),
) -> dict[str, Doer]:
    """Return who does each of these steps; for the arguments, see `describe_doer`.

    `children` are the steps that are runs of other workflows, whatever rows and handlers say.
    """
    return {
        slug: Doer(f"{Kind.CHILD} {children[slug].workflow}")
        if slug in children
        else describe_doer(slug, rows.get(slug), workflow, source)
        for slug in order
    }


def locate_function(handler: PythonHandler) -> tuple[str, str, int]:
    """Return the name of a handler's function, its file, and the line at which it begins."""
    function = inspect.unwrap(handler.function)
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    name = getattr(function, "__name__", type(function).__name__)
    if code is None:  # written in C
        return name, "its module", 0
    path = Path(code.co_filename)
    here = Path.cwd()
    return name, str(path.relative_to(here) if path.is_relative_to(here) else path), code.co_firstlineno
