"""Rows are flipped every 100 ms while Airflow and workers here execute runs, and workers of both sides are killed."""

import json
import os

from tests.acceptance.conftest import CommandLine, Services, wait_until
from tests.airflow.live.flip_storm import DAG_ID, VARIABLE, FlipStorm
from tests.airflow.live.policies import Policies
from tests.airflow.live.server import Airflow


def test_each_task_is_executed_once_and_each_run_ends_on_both_sides(
    airflow: Airflow, policies: Policies, cli: CommandLine, services: Services, dsn: str
) -> None:
    asked = json.loads(os.environ.get(VARIABLE, '{"runs": 8, "kills": 1, "seed": 0}'))
    policies.add(DAG_ID)
    storm = FlipStorm(airflow, services, dsn, **asked)
    wrong = storm.blow()
    print(storm.describe())
    assert not wrong, "\n".join([storm.describe(), *wrong])
    assert storm.flips > 0
    assert all(storm.killed.values())
    wait_until(lambda: cli("reconcile", "--all").code == 0, "PostgreSQL and Prefect agree")
