-- Runs that Airflow executes.

-- add_mirror --
-- Let mirrors follow the DAG of a workflow.
SELECT pgflow_prefect.add_mirror(%(workflow_slug)s) AS added

-- list_mirrors --
-- The workflows whose DAGs are followed.
SELECT workflow_slug, enabled, held_by, is_held, looked_at, since FROM pgflow_prefect.list_mirrors()

-- take_mirrors --
-- Take those that no other service holds, and extend one's own.
SELECT workflow_slug, epoch, read_to FROM pgflow_prefect.take_mirrors(%(holder)s, %(held_by)s, %(lease)s)

-- release_mirrors --
-- Let another service take them at once.
SELECT pgflow_prefect.release_mirrors(%(holder)s)

-- note_look --
-- Note how far Airflow's runs were looked at.
SELECT pgflow_prefect.note_look(%(holder)s, %(workflow_slugs)s, %(read_to)s)

-- find_mirrored --
-- Those of these runs of Airflow that have rows here.
SELECT run_id, workflow_slug, source_id, source_run_id, source_mark, status
FROM pgflow_prefect.find_mirrored(%(workflow_slugs)s, %(source_run_ids)s)

-- list_mirrored --
-- Mirrored runs, in the order of Airflow's ids.
SELECT run_id, workflow_slug, source_id, source_run_id, source_mark, status
FROM pgflow_prefect.list_mirrored(%(workflow_slugs)s, %(only_pending)s, %(after)s, %(limit)s)

-- find_executed_elsewhere --
-- Those of these runs that Airflow executes, or has executed.
SELECT run_id FROM pgflow_prefect.find_executed_elsewhere(%(run_ids)s) AS run_id

-- mirror_run --
-- Write how a run of Airflow stands.
SELECT run_id, status, changed, left_out, problems
FROM pgflow_prefect.mirror_run(%(epoch)s, %(found)s::jsonb, %(results)s::text[])

-- execute_mirrored_run --
-- Make a run of Airflow one of this database.
SELECT pgflow_prefect.execute_mirrored_run(%(run_id)s) AS was_mirrored

-- list_airflow_shadows --
-- Steps that Airflow has completed, and whose shadows are due.
SELECT run_id, workflow_slug, step_slug
FROM pgflow_prefect.list_airflow_shadows(%(workflow_slugs)s, %(step_slugs)s, %(limit)s)

-- begin_airflow_shadow --
-- The input of a step that Airflow has completed, and its result, for one process.
SELECT payload::text, upstream_results::text, logical_date, interval_start, interval_end, result::text, attempt, began_at,
       ended_at, task_run_id, flow_run_id, notes, unread
FROM pgflow_prefect.begin_airflow_shadow(%(run_id)s, %(step_slug)s, %(upstream)s)

-- release_airflow_shadow --
-- Let another process begin it.
SELECT pgflow_prefect.release_airflow_shadow(%(run_id)s, %(step_slug)s)
