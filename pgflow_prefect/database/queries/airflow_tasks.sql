-- DAGs of Airflow whose tasks ask who does them.

-- name_airflow_dags --
-- Let the tasks of these DAGs ask.
SELECT slug FROM pgflow_prefect.name_airflow_dags(%(workflow_slugs)s::text[]) AS slug

-- remove_airflow_dags --
-- Let the tasks of these DAGs ask no more.
SELECT workflow_slug, moved, going_on FROM pgflow_prefect.remove_airflow_dags(%(workflow_slugs)s::text[])

-- list_asking_dags --
-- Those of these DAGs whose tasks ask.
SELECT slug FROM unnest(%(workflow_slugs)s::text[]) AS slug WHERE pgflow_prefect.has_policy(slug)

-- list_asking_runs --
-- Pending runs whose tasks ask, with the steps that Airflow does.
SELECT run_id, workflow_slug, source_run_id, steps
FROM pgflow_prefect.list_asking_runs(%(workflow_slugs)s::text[], %(after)s, %(limit)s)

-- end_unseen_airflow_task --
-- Report a task that has not reported itself.
SELECT pgflow_prefect.end_unseen_airflow_task(
    %(run_id)s, %(step_slug)s, %(try_number)s, %(outcome)s, %(result)s::text::jsonb, %(message)s) AS ended
