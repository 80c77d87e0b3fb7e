"""Finds the entry point by which Prefect's workers load a workflow's flow."""

from pathlib import Path
from types import ModuleType

from pgflow_prefect.deployment import bound
from pgflow_prefect.deployment.handler_files import BY_ROWS, find_module, find_workflow, is_file
from pgflow_prefect.errors import UsageError


def make_entrypoint(workflow_slug: str, source: str, directory: Path) -> str:
    """Return the entry point of a workflow's flow: `path/to/file.py:NAME`, or `package.module:NAME`.

    Args:
        workflow_slug: the workflow.
        source: the file or module that its handlers were loaded from, or `BY_ROWS`.
        directory: the working directory of the flow runs; the entry point of a file beneath it is relative.

    Raises:
        UsageError: the file's name does not end in `.py`, or the workflow was not loaded from there.
    """
    if source == BY_ROWS:
        return bound.ENTRYPOINT
    module = find_module(source)
    if module is None:
        raise UsageError(f"{source} has not been loaded: there is no flow to deploy")
    name = _find_flow(module, workflow_slug, source)
    if not is_file(source):
        return f"{source}:{name}"
    path = Path(source).resolve()
    if path.suffix != ".py":
        raise UsageError(f"{source} can't be deployed: Prefect loads flows from files whose names end in .py only")
    return f"{path.relative_to(directory) if path.is_relative_to(directory) else path}:{name}"


def _find_flow(module: ModuleType, workflow_slug: str, source: str) -> str:
    """Return the name of a workflow's flow in a module, `flow` or `workflow.flow` most often."""
    workflow = find_workflow(module, workflow_slug, source)
    names = vars(module)
    given = workflow.given_flow  # it may be `workflow.flow.with_options(…)`
    flows = [name for name, value in names.items() if value is given]
    if flows:
        return "flow" if "flow" in flows else flows[0]
    return next(f"{name}.flow" for name, value in names.items() if value is workflow)
