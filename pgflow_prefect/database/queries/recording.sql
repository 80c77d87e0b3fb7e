-- Runs that Prefect hears of later.

-- begin_unshown_runs --
-- Hold runs that were reserved without telling Prefect, and hear what their first claims need to know.
WITH bound AS MATERIALIZED (SELECT pg_catalog.set_config('lock_timeout', %(lock_timeout)s, true) AS lock_timeout)
SELECT b.run_id, b.linked, b.shown, b.status, b.remaining, b.definition_id
FROM bound, LATERAL pgflow_prefect.begin_unshown_runs(
    CASE WHEN bound.lock_timeout IS NOT NULL THEN %(run_ids)s::uuid[] END, %(epochs)s, %(placeholders)s, %(held_by)s
) AS b

-- link_recorded_runs --
-- Name the flow runs that now show runs, and hear for which of them this was news.
SELECT run_id FROM pgflow_prefect.link_recorded_runs(%(run_ids)s, %(epochs)s, %(flow_run_ids)s) AS run_id

-- list_unshown --
-- Runs that another program executes, and that Prefect does not show.
SELECT run_id FROM pgflow_prefect.list_unshown(%(workflow_slugs)s, %(adopt)s, %(with_ended)s, %(since)s, %(besides)s::uuid[],
                                               %(limit)s) AS run_id

-- list_observed --
-- Runs that another program executes, and whose end Prefect does not show yet.
SELECT run_id FROM pgflow_prefect.list_observed(%(workflow_slugs)s, %(after)s::uuid, %(limit)s) AS run_id

-- list_map_tasks --
-- The tasks of the maps of a run, of maps with at most so many.
SELECT step_slug, task_index, status, ended_as, attempts, NULL AS step_result, error_message, created_at, started_at,
       finished_at, task_state, handler, skip_reason
FROM pgflow_prefect.list_map_tasks(%(run_id)s, %(limit)s)

-- forget_deleted_runs --
-- Delete our rows of runs that pgflow has deleted.
SELECT pgflow_prefect.forget_deleted_runs(%(after)s, %(limit)s) AS last

-- list_left_unshown --
-- Ended runs that are neither shown nor left unshown for good, by id.
SELECT run_id, workflow_slug, epoch, status, seconds
FROM pgflow_prefect.list_left_unshown(%(workflow_slugs)s, %(grace)s, %(after)s, %(limit)s)

-- list_unrecorded --
-- Ended runs of a workflow that Prefect was never shown, in the order of their ends.
SELECT run_id, finished_at
FROM pgflow_prefect.list_unrecorded(%(workflow_slug)s, %(status)s, %(ended_as)s, %(since)s, %(after_finished)s, %(after)s,
                                    %(limit)s)

-- read_unrecorded --
-- Those of these runs that Prefect was never shown.
SELECT id, workflow_slug, epoch, status, ended_as, error_message, created_at, taken_at, finished_at, definition_id, step_count
FROM pgflow_prefect.read_unrecorded(%(run_ids)s)

-- list_unrecorded_steps --
-- Their steps, without results, which may be large.
SELECT run_id, step_slug, task_index, status, ended_as, attempts, NULL AS step_result, error_message, created_at,
       started_at, finished_at, task_state, handler, first_claimed_at, task_run_id, skip_reason, skip_message
FROM pgflow_prefect.list_unrecorded_steps(%(run_ids)s)
