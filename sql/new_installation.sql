-- In a database that is a copy and works beside the original: it becomes an installation of its own.
-- `pgflow-prefect init --new-installation` runs this. Stop the services of this database first.
SELECT pgflow_prefect.new_installation() AS id;
