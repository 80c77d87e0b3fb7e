"""Finds what is wrong with the storages of a workflow's results, before a run."""

from collections.abc import Iterator

from pgflow_prefect.errors import UsageError
from pgflow_prefect.execution.result_options import read_result_options
from pgflow_prefect.settings import Settings
from pgflow_prefect.workflow import Workflow


def find_result_problems(workflow: Workflow, settings: Settings) -> Iterator[str]:
    """Yield a sentence for each step that names a serializer without a storage, and for a bad setting.

    Args:
        workflow: the handlers.
        settings: of the process that executes its runs.
    """
    try:
        known = read_result_options(settings).storage
    except UsageError as error:
        yield str(error)
        return
    for slug, handler in workflow.handlers.items():
        said = handler.results
        if said.codec is not None and said.storage is None and known is None:
            yield (
                f"step {slug!r} has result_serializer={said.codec.name!r} and no storage: name one by result_storage=, "
                "or by PGFLOW_RESULT_STORAGE"
            )
