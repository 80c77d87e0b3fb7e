"""The process of one flow run of `serve`: Prefect's engine, which loads files of handlers as `run` and `worker` do.

Prefect's own loader puts the folder of a file before the standard library. It gives a second file of one name a name
that no child process can import.
"""

import runpy
from pathlib import Path
from types import ModuleType

from prefect.exceptions import ScriptError
from prefect.utilities import importtools

from pgflow_prefect.deployment.handler_modules import load_file


def _load_script(path: str) -> ModuleType:
    """Execute the file of a flow and return its module; stands in for `prefect.utilities.importtools`' function.

    Raises:
        ScriptError: the file can't be imported.
    """
    try:
        return load_file(Path(path).resolve())
    except Exception as error:
        raise ScriptError(user_exc=error, path=path) from error


if __name__ == "__main__":
    importtools.load_script_as_module = _load_script
    runpy.run_module("prefect.engine", run_name="__main__")
