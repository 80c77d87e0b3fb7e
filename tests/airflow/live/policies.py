"""Task policies of DAGs, as `pgflow-prefect airflow policy` prints them."""

from dataclasses import dataclass

from tests.acceptance.conftest import CommandLine
from tests.airflow.live.server import Airflow


@dataclass(frozen=True)
class Policies:
    """Lets DAGs ask this test's database, as the guide says."""

    airflow: Airflow
    cli: CommandLine
    address: str

    def add(self, dag_id: str, address: str | None = None) -> None:
        """Import a DAG, observe it, and let it ask: by a Connection with this address, or with the right one."""
        for command in (("import", "--from", "airflow", dag_id), ("observe", dag_id)):
            assert (done := self.cli(*command)).code == 0, done.err
        printed = self.cli("airflow", "policy", dag_id, "--connection", f"pgflow_{dag_id}")
        assert printed.code == 0, printed.err
        self.airflow.add_connection(f"pgflow_{dag_id}", address or self.address)
        self.airflow.write_policy(printed.out)
