-- DAGs of Airflow whose tasks ask who does them.

-- name_airflow_dags --
-- Let the tasks of these DAGs ask.
SELECT slug FROM pgflow_prefect.name_airflow_dags(%(workflow_slugs)s::text[]) AS slug
