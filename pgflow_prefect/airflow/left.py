"""What is left in Airflow: the part of a ledger that says who executes each task now."""

import re
from collections.abc import Mapping, Sequence

from pgflow_prefect.definitions.origin import list_names
from pgflow_prefect.wording import write_code

_BEGIN, _END = "<!-- left in Airflow: begin -->", "<!-- left in Airflow: end -->"
_PART = re.compile(rf"\n*{re.escape(_BEGIN)}.*?{re.escape(_END)}\n*", re.DOTALL)


def describe_left(slug: str, doers: Mapping[str, str], *, asks: bool, is_followed: bool) -> list[str]:
    """Return lines that say what Airflow still does.

    Args:
        slug: the workflow, and its DAG.
        doers: who executes each step, in their order: the kind of its binding, `external` for Airflow.
        asks: the tasks of the DAG ask here.
        is_followed: a mirror follows the DAG.
    """
    left = [step for step, kind in doers.items() if kind == "external"]
    here = [f"{write_code(step)} ({kind})" for step, kind in doers.items() if kind != "external"]
    lines = [
        f"- Airflow executes {len(left)} of {len(doers)} tasks: {list_names(left)}"
        if left
        else "- Airflow executes no task",
        f"- executed here: {', '.join(here)}" if here else "- executed here: none yet",
        "- tasks ask here who executes them: `airflow policy`"
        if asks
        else "- tasks do not ask here: no `airflow policy`",
    ]
    if is_followed and not asks:
        lines.append("- a mirror writes Airflow's runs here")
    if left:
        lines.append("- the schedule stays with Airflow until all tasks are here")
    else:
        named = write_code(f"pgflow-prefect deploy {slug} --as-in-airflow")
        lines.append(f"- the last day: pause the DAG in Airflow, and take the schedule over by {named}")
    return lines


def replace_left(page: str, command: str, lines: Sequence[str]) -> str:
    """Return a ledger whose part on what is left in Airflow is written anew. All else stays, to the letter.

    Args:
        page: the ledger.
        command: the one that writes the part.
        lines: of the part.
    """
    part = "\n".join(
        [_BEGIN, "## Left in Airflow", "", f"{write_code(command)} writes this part anew.", "", *lines, _END]
    )
    if _PART.search(page):
        return _PART.sub(lambda found: f"\n\n{part}\n" + ("\n" if found.end() < len(page) else ""), page, count=1)
    return f"{page.rstrip()}\n\n{part}\n"
