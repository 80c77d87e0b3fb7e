"""The lines of the ledger about a task's arguments, and about the names that they mention."""

from collections.abc import Iterator

from pgflow_prefect.definitions.airflow.tasks import AirflowTask
from pgflow_prefect.definitions.origin import LedgerLine, list_names
from pgflow_prefect.wording import write_code

_LOGICAL = frozenset({"ds", "ds_nodash", "ts", "ts_nodash", "ts_nodash_with_tz", "logical_date", "execution_date"})


def _describe_dates(dates: tuple[str, ...], *, has_interval: bool) -> str:
    """Return where the dates of a run are here: Airflow's logical date may be the beginning of the interval."""
    here = {name: f"context.{name}" for name in ("data_interval_start", "data_interval_end")}
    here |= dict.fromkeys(_LOGICAL, here["data_interval_start"] if has_interval else "context.logical_date")
    found = sorted({here[each] for each in dates if each in here})
    rest = "" if all(each in here for each in dates) else " Compute the others from context.logical_date."
    return f"It reads {list_names(dates)}.{f' Here: {list_names(found)}.' if found else ''}{rest}"


def describe_arguments(task: AirflowTask) -> Iterator[LedgerLine]:
    """Yield what the arguments of a task leave to do: templates, files, and what the document does not have."""
    slug = task.task_id
    if templates := [argument.name for argument in task.arguments if argument.is_template]:
        yield LedgerLine(
            slug,
            "template",
            f"Airflow renders {list_names(templates)}. Write that in the handler.",
            is_done=False,
        )
    for argument in task.arguments:
        if argument.file is not None:
            yield LedgerLine(
                slug,
                "file",
                f"The text of {write_code(argument.name)} is in the file {write_code(argument.file)}.",
                is_done=False,
            )
    if objects := [argument.name for argument in task.arguments if argument.is_object]:
        says = (
            f"{list_names(objects)}: the document has the name of an object, not what it is. Look into the DAG's file."
        )
        yield LedgerLine(slug, "argument", says, is_done=False)
    if cut := [argument.name for argument in task.arguments if argument.is_cut]:
        says = f"{list_names(cut)}: Airflow has kept the beginning only. Look into the DAG's file."
        yield LedgerLine(slug, "argument", says, is_done=False)


def describe_names(task: AirflowTask, *, has_interval: bool) -> Iterator[LedgerLine]:
    """Yield the names that the arguments of a task mention: dates, connections, Variables, parameters, XComs."""
    slug, mentioned = task.task_id, task.mentioned
    if mentioned.dates:
        yield LedgerLine(
            slug,
            "date",
            _describe_dates(mentioned.dates, has_interval=has_interval),
            is_done=False,
        )
    if mentioned.connections:
        yield LedgerLine(
            slug,
            "connection",
            f"{list_names(mentioned.connections)}. Its values were not read. Use a block of Prefect.",
            is_done=False,
        )
    if mentioned.variables:
        yield LedgerLine(
            slug,
            "Variable",
            f"{list_names(mentioned.variables)}. Its value was not read. Use a variable of Prefect.",
            is_done=False,
        )
    if mentioned.params:
        yield LedgerLine(
            slug, "params", f"It reads {list_names(mentioned.params)}. Give it in the payload.", is_done=False
        )
    if mentioned.keys:
        yield LedgerLine(
            slug,
            "XCom",
            f"It reads the keys {list_names(mentioned.keys)}. A step has one result here: put them into it.",
            is_done=False,
        )
