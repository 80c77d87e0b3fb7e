"""Writes the file by which tasks of an Airflow ask who does them."""

import re
from collections.abc import Sequence
from importlib.resources import files
from typing import Literal
from uuid import UUID

Wait = Literal["deferrable", "reschedule"]


def write_policy(dags: Sequence[str], installation: UUID, *, connection: str, wait: Wait, longest_wait: float) -> str:
    """Return the file `pgflow_policy.py` for an Airflow.

    Args:
        dags: ids of the DAGs whose tasks ask.
        installation: of the database that they ask.
        connection: the id of Airflow's Connection with its address.
        wait: how a task waits: by Airflow's triggerer, or by looking again and again.
        longest_wait: in seconds, of a task without a time-out of its own.
    """
    chosen = {
        "DAGS: frozenset[str]": f"frozenset({sorted(set(dags))!r})",
        "INSTALLATION": f"uuid.UUID({str(installation)!r})",
        "CONNECTION": repr(connection),
        "WAIT": repr(wait),
        "LONGEST_WAIT": repr(longest_wait),
    }
    text = files("pgflow_prefect.airflow").joinpath("policy_script.py").read_text(encoding="utf-8")
    for name, written in chosen.items():
        line = f"{name} = {written}"
        text, found = re.subn(rf"^{re.escape(name)} = .*$", lambda _, line=line: line, text, flags=re.MULTILINE)  # type: ignore[misc]
        assert found == 1, f"the script has {name} once"
    return text
