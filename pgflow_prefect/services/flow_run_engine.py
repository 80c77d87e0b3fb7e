"""The process of one flow run of `serve`: Prefect's engine, which loads files of handlers as `run` and `worker` do.

Prefect's own loader puts the folder of a file before the standard library. It gives a second file of one name a name
that no child process can import.
"""

import logging
import runpy
import warnings
from pathlib import Path
from types import ModuleType

from prefect.exceptions import ScriptError, TerminationSignal

from pgflow_prefect.deployment.handler_modules import load_file
from pgflow_prefect.prefect_api.internals import importtools


def _load_script(path: str) -> ModuleType:
    """Execute the file of a flow and return its module. This replaces the function of `prefect.utilities.importtools`.

    Raises:
        ScriptError: the file can't be imported.
    """
    try:
        return load_file(Path(path).resolve())
    except Exception as error:
        raise ScriptError(user_exc=error, path=path) from error


def _tells_more_than_a_stop(record: logging.LogRecord) -> bool:
    """Drop records of asyncio about a task that SIGTERM ended.

    Prefect raises SIGTERM as an exception at any place. asyncio logs a traceback for each task that it ends while the
    event loop shuts down.
    """
    raised = record.exc_info[1] if record.exc_info else None
    return not isinstance(raised, TerminationSignal)


if __name__ == "__main__":
    logging.getLogger("asyncio").addFilter(_tells_more_than_a_stop)
    importtools.load_script_as_module = _load_script
    # The imports above have imported Prefect's engine, which does not matter: it keeps nothing between two calls.
    warnings.filterwarnings("ignore", "'prefect.engine' found in sys.modules", RuntimeWarning)
    runpy.run_module("prefect.engine", run_name="__main__")
