-- In a database that replaces the one that it is a copy of, after a restore or pg_upgrade: it goes on as that one.
-- `pgflow-prefect init --moved` runs this.
SELECT pgflow_prefect.move_installation() AS moved;
