"""A process that has imported what commands import, and forks itself for each of them: 2 s of CPU less each time.

`forked.py` starts it as a script, with a listening socket as its first argument, and connects for each command: it
sends the arguments, the directory and the environment as JSON, with three files to become standard input, output and
error. It reads the command's process id, and later its exit code, a line each.

Nothing of the product is imported beforehand, and Prefect is as if it were not, until the command imports it: then it
reads its settings, from the command's environment, as it does when it is really imported.
"""

import gc
import json
import os
import random
import runpy
import select
import socket
import sys
from contextlib import suppress
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import NoReturn

_IMPORTED = (
    *("anyio", "asyncio", "cyclopts", "httpx", "jinja2", "networkx", "platformdirs", "psycopg.types.json"),
    *("psycopg_pool", "pydantic_settings", "rich.live", "rich.markdown", "rich.table", "websockets.asyncio.client"),
    *("prefect.main", "prefect.blocks.system", "prefect.cache_policies", "prefect.client.orchestration"),
    *("prefect.events.clients", "prefect.flow_engine", "prefect.logging.handlers", "prefect.runner"),
    *("prefect.task_engine", "prefect.task_runners"),
)


class _PrefectAsIfNew(MetaPathFinder, Loader):
    """Hides Prefect's modules, and has them back when one of them is imported."""

    def __init__(self) -> None:
        names = [name for name in sys.modules if name == "prefect" or name.startswith("prefect.")]
        self._modules = {name: sys.modules.pop(name) for name in names}
        self._spec = self._modules["prefect"].__spec__

    def find_spec(self, fullname: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if fullname == "prefect" else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        sys.meta_path.remove(self)
        sys.modules.update(self._modules)
        module.__spec__ = self._spec
        # What depends on the environment when it is imported.
        import_module("prefect.context").refresh_global_settings_context()
        import_module("prefect.logging.configuration").setup_logging(incremental=False)


def _become_command(connection: socket.socket) -> list[str]:
    """Take on what a command is started with, and return its arguments."""
    size = int.from_bytes(connection.recv(4, socket.MSG_WAITALL), "big")
    wish, files, _, _ = socket.recv_fds(connection, size, 3, socket.MSG_WAITALL)
    arguments, directory, environment = json.loads(wish)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    connection.close()
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[0] = directory  # as `python -m` has it
    random.seed()
    return list(map(str, arguments))


def _watch(command: int, connection: socket.socket) -> NoReturn:
    """Tell who the command is, and how it ends; end with it."""
    with suppress(BrokenPipeError):  # no one reads it any more
        connection.sendall(b"%d\n" % command)
        _, status = os.waitpid(command, 0)
        connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
    os._exit(0)


def await_command() -> list[str]:
    """Return in a process of each command's own, with its arguments; end when standard input does."""
    listener = socket.socket(fileno=int(sys.argv[1]))
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        _forget_ended()
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            if command := os.fork():
                _watch(command, connection)
            return _become_command(connection)
        connection.close()
    _forget_ended()
    sys.exit(0)


def _forget_ended() -> None:
    """Wait for those that watched a command that has ended."""
    with suppress(ChildProcessError):  # there are none at all
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass


if __name__ == "__main__":
    for name in _IMPORTED:
        import_module(name)
    sys.meta_path.insert(0, _PrefectAsIfNew())
    gc.collect()
    gc.freeze()  # commands have it in common, and none of them goes through it again
    sys.argv = ["pgflow-prefect", *await_command()]
    runpy.run_module("pgflow_prefect", run_name="__main__", alter_sys=True)
