"""Finds a command by its name, runs it, and prints its errors."""

import atexit
import gc
import os
import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

from cyclopts import App, CycloptsError, Parameter

from pgflow_prefect.errors import NotOnReleasedError, PgflowPrefectError, UsageError

_CODE = "bold cyan on black"  # how a command's help shows what its docstring has between backticks

HELP = f"""Run pgflow workflows, which live in PostgreSQL, on Prefect.

The database is the one of [{_CODE}]--dsn[/], else [{_CODE}]PGFLOW_DSN[/], else of the Prefect block \
that [{_CODE}]PGFLOW_BLOCK[/] names, else of libpq's [{_CODE}]PG*[/] variables, else an embedded server.
"""

app = App(
    name="pgflow-prefect",
    help=HELP,
    help_format="rich",  # rich's Markdown takes longer to import than the whole help takes to print
    version_flags=["--version", "-V"],
    suppress_keyboard_interrupt=False,  # `main` says what happened
)
app.meta.suppress_keyboard_interrupt = False

# By name, so that `--help` imports no command: Prefect alone takes a second. The order is that of a first session.
COMMANDS = {
    "demo": ("demo:demo", "Show an example: a workflow in SQL, run on Prefect, on servers that come with the package."),
    "init": ("init:init", "Install or upgrade the schema in the database."),
    "import": ("import_:import_", "Write a Python file with a stub for each step of a workflow."),
    "airflow": ("airflow:app", "Follow the runs of Airflow, or print what reads DAGs or moves tasks there."),
    "push": ("push:push", "Write the workflow that a Python file defines into the database."),
    "list": ("list_:list_", "List the workflows that the database defines."),
    "validate": ("validate:validate", "Check a workflow and its handlers, and name every problem."),
    "graph": ("graph:graph", "Draw a workflow, or a run of it."),
    "export": ("export:export", "Print the SQL that defines a workflow."),
    "run": ("run:run", "Run a workflow on Prefect, here and now."),
    "deploy": ("deploy:deploy", "Create or update the Prefect deployment of workflows."),
    "diff": ("diff:diff", "Name what differs between database, handlers and deployment."),
    "block": ("block:block", "Save the database's address in Prefect, where flow runs find it."),
    "bind": ("bind:bind", "Choose who does a step: Python, SQL, HTTP, a queue, an external worker."),
    "credentials": ("credentials:credentials", "Show which credentials the rows name, and which settings they need."),
    "observe": ("observe:observe", "Show a workflow in Prefect that external workers execute."),
    "shadow": ("shadow:shadow", "Run a handler beside an external worker, and compare."),
    "enable": ("enable:enable", "Let workers and bridges take a workflow's new runs."),
    "disable": ("disable:disable", "Stop workers and bridges from taking a workflow's runs."),
    "worker": ("worker:worker", "Execute runs as they come, in this process."),
    "serve": ("serve:serve", "Deploy workflows and execute their runs, each in a process of its own."),
    "bridge": ("bridge:bridge", "Submit the runs that SQL starts to Prefect's own workers."),
    "backfill": ("backfill:app", "Start runs for dates of the past, and steer them."),
    "runs": ("runs:runs", "List the newest runs."),
    "status": ("status:status", "Show a run and its steps."),
    "logs": ("logs:logs", "Show what a run's handlers have logged."),
    "open": ("open_:open_", "Open a run's page in Prefect's UI."),
    "timeline": ("timeline:timeline", "Show when each step of a run began and how long it took."),
    "retry": ("retry:retry", "Make a failed run pending again."),
    "skip": ("skip:skip", "Skip a step of a run, with what is below it or without."),
    "cancel": ("cancel:cancel", "End a run, in PostgreSQL and in Prefect."),
    "record": ("record:record", "Show ended runs in Prefect that it was never told of."),
    "reconcile": ("reconcile:reconcile", "Compare PostgreSQL with Prefect, and repair the differences."),
    "prune": ("prune:prune", "Delete runs that have ended: old ones, a workflow's, or one."),
    "doctor": ("doctor:doctor", "Check the database, Prefect, and the connections between them."),
    "guide": ("guide:guide", "Show a page of the guide: the engine, scaling, Supabase, …"),
}
for place, (command, (target, summary)) in enumerate(COMMANDS.items()):
    app.command(f"pgflow_prefect.cli.{target}", name=command, help=summary, sort_key=place)


@app.meta.default
def launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    debug: Annotated[bool, Parameter(negative="", show_default=False)] = False,
) -> object:
    """Handle the options that every command has, and run the named command.

    Args:
        tokens: the command and its arguments.
        debug: Show tracebacks, and Prefect's own messages.
    """
    if debug:
        os.environ["PGFLOW_DEBUG"] = "1"
    if tokens[:1] == ("import",):
        tokens = name_json_file(tokens)
    if "--json" in tokens:
        from pgflow_prefect.cli.console import print_errors_as_json

        print_errors_as_json()
    return app(tokens, exit_on_error=False, print_error=False)


def name_json_file(given: tuple[str, ...]) -> tuple[str, ...]:
    """Return the arguments of `import` with `--json FILE` as `--json-file FILE`, where it has a source.

    Everywhere else, --json is the switch for output in JSON.
    """
    if not any(each == "--from" or each.startswith("--from=") for each in given):
        return given
    named = list(given)
    for place, each in enumerate(given):
        following = given[place + 1 : place + 2]
        if each == "--json" and following and (following == ("-",) or not following[0].startswith("-")):
            named[place] = "--json-file"
        elif each.startswith("--json="):
            named[place] = f"--json-file{each.removeprefix('--json')}"
    return tuple(named)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit: 0 done, 1 failed, 2 used wrongly, 130 interrupted, 143 terminated."""
    _collect_less()
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--debug" not in arguments:
        # Prefect's console would repeat our messages, with tracebacks. Logs that go to its API are not affected.
        # Prefect reads this setting once, when it is imported.
        os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    try:
        if named := _find_command(arguments):
            app[named].help = None  # the summary is for the list of commands; a command's own help shows its docstring
            app[named].help_format = "markdown"
        result = app.meta(arguments, exit_on_error=False, print_error=False)
        code = result if isinstance(result, int) else 0
    except SystemExit as error:  # with a command's result, as cyclopts has it, or after SIGTERM
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except CycloptsError as error:
        code = _print_error(f"{error}", hint=_name_help(arguments), code=2)
    except UsageError as error:
        code = _print_error(str(error), code=2)
    except PgflowPrefectError as error:
        code = _print_error(str(error), hint=_explain(error, arguments), code=1)
    except KeyboardInterrupt:
        code = _print_error("interrupted", code=130)
    except BrokenPipeError:  # `pgflow-prefect list | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:  # noqa: BLE001  whatever it is, a user gets a sentence
        code = _print_error(
            f"unexpected {type(error).__name__}: {error}", hint="--debug shows where it comes from", code=1
        )
    _exit(code)


def _find_command(arguments: Sequence[str]) -> str | None:
    return next((argument for argument in arguments if argument in COMMANDS), None)


def _name_help(arguments: Sequence[str]) -> str:
    """Return which help shows what a command line may have."""
    if arguments and arguments[0] in COMMANDS:
        return f"`pgflow-prefect {arguments[0]} --help` shows what it takes"
    return "`pgflow-prefect --help` shows the commands"


def _explain(error: PgflowPrefectError, arguments: Sequence[str]) -> str | None:
    """Return why the command does not work on the released pgflow, where that is the error."""
    if not isinstance(error, NotOnReleasedError):
        return None
    from pgflow_prefect.database.implementations.released import REASONS

    command = _find_command(arguments)
    reason = REASONS.get(command or "")
    return None if reason is None else f"`{command}`: {reason}"


def _exit(code: int) -> NoReturn:
    """End the process. If an abandoned handler would keep it alive, end it at once."""
    signals = sys.modules.get("pgflow_prefect.execution.process.signals")
    if signals is not None and signals.is_held_up():
        atexit._run_exitfuncs()  # logs and events that are still waiting are sent
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _collect_less() -> None:
    """Collect garbage less often: imports leave almost none.

    Collecting took a fifth of the time of a command that imports Prefect.
    """
    gc.set_threshold(20_000, 10, 10)
    atexit.register(gc.freeze)


def _print_error(message: str, *, hint: str | None = None, code: int) -> int:
    from pgflow_prefect.cli.console import print_error

    return print_error(message, hint=hint, code=code)
