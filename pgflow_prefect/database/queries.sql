-- The statements of the store. A name between dashes, a sentence, the statement.

-- find_schemas --
-- Whether the engine's and the adapter's schema are there.
SELECT to_regprocedure('pgflow.engine_version()') IS NOT NULL AS engine,
       to_regprocedure('pgflow_prefect.adapter_version()') IS NOT NULL AS adapter

-- read_engine_version --
-- The version of the installed pgflow.sql.
SELECT pgflow.engine_version() AS version

-- read_adapter_version --
-- The version of the installed pgflow_prefect.sql.
SELECT pgflow_prefect.adapter_version() AS version

-- list_workflows --
-- Every workflow with its size and its runs.
SELECT w.slug,
       (SELECT count(*) FROM pgflow.steps s WHERE s.workflow_slug = w.slug) AS steps,
       (SELECT count(*) FROM pgflow.deps d WHERE d.workflow_slug = w.slug) AS deps,
       coalesce(r.pending, 0) AS pending, coalesce(r.completed, 0) AS completed, coalesce(r.failed, 0) AS failed
FROM pgflow.workflows w
LEFT JOIN (SELECT workflow_slug,
                  count(*) FILTER (WHERE status = 'pending') AS pending,
                  count(*) FILTER (WHERE status = 'completed') AS completed,
                  count(*) FILTER (WHERE status = 'failed') AS failed
           FROM pgflow.runs GROUP BY workflow_slug) r ON r.workflow_slug = w.slug
ORDER BY w.slug

-- list_slugs --
-- The slugs of all workflows.
SELECT slug FROM pgflow.workflows ORDER BY slug

-- load_definition --
-- A workflow as it is defined now, in one statement: an edit in between can't mix two versions.
SELECT w.slug,
       ARRAY(SELECT s.slug FROM pgflow.steps s WHERE s.workflow_slug = w.slug ORDER BY s.slug) AS steps,
       ARRAY(SELECT ARRAY[d.from_step_slug, d.to_step_slug] FROM pgflow.deps d WHERE d.workflow_slug = w.slug
             ORDER BY d.from_step_slug, d.to_step_slug) AS deps
FROM pgflow.workflows w
WHERE w.slug = %(workflow_slug)s

-- load_run_definition --
-- The definition that a run began with; the current one of a run that nothing was done to yet.
SELECT r.workflow_slug AS slug,
       CASE WHEN r.definition_id IS NULL
            THEN ARRAY(SELECT s.slug FROM pgflow.steps s WHERE s.workflow_slug = r.workflow_slug ORDER BY s.slug)
            ELSE ARRAY(SELECT s.slug FROM pgflow.definition_steps s WHERE s.definition_id = r.definition_id
                       ORDER BY s.slug) END AS steps,
       CASE WHEN r.definition_id IS NULL
            THEN ARRAY(SELECT ARRAY[d.from_step_slug, d.to_step_slug] FROM pgflow.deps d
                       WHERE d.workflow_slug = r.workflow_slug ORDER BY d.from_step_slug, d.to_step_slug)
            ELSE ARRAY(SELECT ARRAY[d.from_step_slug, d.to_step_slug] FROM pgflow.definition_deps d
                       WHERE d.definition_id = r.definition_id ORDER BY d.from_step_slug, d.to_step_slug) END AS deps
FROM pgflow.runs r
WHERE r.id = %(run_id)s

-- create_run --
-- Start a run and take it; the same id again finds the run that exists.
SELECT pgflow_prefect.create_run(%(workflow_slug)s, %(payload)s::jsonb, %(run_id)s, %(flow_run_id)s, %(held_by)s,
                                 %(lease)s, %(max_recoveries)s) AS epoch

-- take_run --
-- Make a flow run the owner of a run.
SELECT pgflow_prefect.take_run(%(run_id)s, %(flow_run_id)s, %(held_by)s, %(lease)s, %(max_recoveries)s,
                               %(force)s) AS epoch

-- take_runs --
-- Reserve pending runs that nobody holds.
SELECT run_id, workflow_slug, epoch, former_flow_run_id
FROM pgflow_prefect.take_runs(%(workflow_slugs)s, %(wanted)s, %(adopt)s, %(held_by)s, %(lease)s, %(max_recoveries)s)

-- link_flow_run --
-- Name the flow run that a run was reserved for.
SELECT pgflow_prefect.link_flow_run(%(run_id)s, %(epoch)s, %(flow_run_id)s, %(queued)s) AS linked

-- release_run --
-- Hand a run back.
SELECT pgflow_prefect.release_run(%(run_id)s, %(epoch)s) AS released

-- extend_leases --
-- Extend leases, and hear how each run is held.
SELECT run_id, epoch, holds FROM pgflow_prefect.extend_leases(%(run_ids)s, %(epochs)s, %(lease)s)

-- enable_workflow --
-- Let workers and bridges take a workflow's new runs, or not.
SELECT workflow_slug, enabled, since FROM pgflow_prefect.enable_workflow(%(workflow_slug)s, %(enabled)s)

-- list_enabled --
-- The workflows that were enabled or disabled.
SELECT workflow_slug, enabled, since FROM pgflow_prefect.enabled_workflows ORDER BY workflow_slug

-- list_older_runs --
-- Pending runs that nobody has ever taken, and that were begun before their workflow was enabled; the oldest first.
SELECT r.id, r.workflow_slug
FROM pgflow.runs r
JOIN pgflow_prefect.enabled_workflows e ON e.workflow_slug = r.workflow_slug AND e.enabled
WHERE r.workflow_slug = ANY (%(workflow_slugs)s) AND r.status = 'pending'
  AND (r.created_at < e.since OR r.created_at IS NULL)
  AND NOT EXISTS (SELECT FROM pgflow_prefect.owners o WHERE o.run_id = r.id)
ORDER BY r.created_at NULLS FIRST, r.id

-- read_run --
-- A run, the flow run that took it last, and who holds it.
SELECT r.id, r.workflow_slug, r.status, r.payload, r.epoch, r.remaining, r.error_message, r.created_at, r.finished_at,
       (SELECT f.flow_run_id FROM pgflow_prefect.flow_runs f
        WHERE f.run_id = r.id ORDER BY f.epoch DESC LIMIT 1) AS flow_run_id,
       o.held_by, coalesce(o.recoveries, 0) AS recoveries, coalesce(o.stale_writes, 0) AS stale_writes,
       CASE WHEN o.run_id IS NULL THEN NULL
            WHEN o.epoch <> r.epoch OR o.lease_until = '-infinity' THEN 'released'
            WHEN o.lease_until = 'infinity' THEN 'queued'
            WHEN pgflow_prefect.is_leased(o.lease_until, %(lease)s) THEN 'leased'
            ELSE 'expired' END AS held
FROM pgflow.runs r
LEFT JOIN pgflow_prefect.owners o ON o.run_id = r.id
WHERE r.id = %(run_id)s

-- list_runs --
-- The newest runs, of one workflow or of all.
SELECT r.id, r.workflow_slug, r.status, r.payload, r.epoch, r.remaining, r.error_message, r.created_at, r.finished_at,
       (SELECT f.flow_run_id FROM pgflow_prefect.flow_runs f
        WHERE f.run_id = r.id ORDER BY f.epoch DESC LIMIT 1) AS flow_run_id,
       o.held_by, coalesce(o.recoveries, 0) AS recoveries, coalesce(o.stale_writes, 0) AS stale_writes,
       CASE WHEN o.run_id IS NULL THEN NULL
            WHEN o.epoch <> r.epoch OR o.lease_until = '-infinity' THEN 'released'
            WHEN o.lease_until = 'infinity' THEN 'queued'
            WHEN pgflow_prefect.is_leased(o.lease_until, %(lease)s) THEN 'leased'
            ELSE 'expired' END AS held
FROM pgflow.runs r
LEFT JOIN pgflow_prefect.owners o ON o.run_id = r.id
WHERE (%(workflow_slug)s::text IS NULL OR r.workflow_slug = %(workflow_slug)s)
  AND (%(status)s::text IS NULL OR r.status = %(status)s)
  AND (%(since)s::timestamptz IS NULL OR r.created_at >= %(since)s)
ORDER BY r.created_at DESC NULLS LAST, r.id
LIMIT %(limit)s

-- list_step_states --
-- The steps of a run that have started, in the order of their start.
SELECT s.step_slug, s.status, s.attempts, s.step_result, s.error_message, s.created_at, s.started_at, s.finished_at,
       t.state_name AS task_state
FROM pgflow.step_states s
LEFT JOIN pgflow_prefect.task_runs t ON t.run_id = s.run_id AND t.step_slug = s.step_slug
WHERE s.run_id = %(run_id)s
ORDER BY s.created_at, s.step_slug

-- read_results --
-- The results of these steps, by slug; only of those that are completed.
SELECT coalesce(jsonb_object_agg(s.step_slug, s.step_result), '{}') AS results
FROM pgflow.step_states s
WHERE s.run_id = %(run_id)s AND s.status = 'completed' AND s.step_slug = ANY (%(step_slugs)s)

-- claim_step --
-- Count an attempt and get the step's input.
SELECT status, attempt, payload, upstream_results
FROM pgflow_prefect.claim_step(%(run_id)s, %(step_slug)s, %(epoch)s, %(task_run_id)s, %(upstream)s, %(with_payload)s)

-- complete_step --
-- Store a result. The result itself need not come back: whoever reads it gets it with its claim.
SELECT status, error_message
FROM pgflow_prefect.complete_step(%(run_id)s, %(step_slug)s, %(result)s::jsonb, %(epoch)s, %(attempt)s, %(task_run_id)s)

-- fail_step --
-- Fail a step and its run.
SELECT status, error_message
FROM pgflow_prefect.fail_step(%(run_id)s, %(step_slug)s, %(error_message)s, %(epoch)s, %(attempt)s, %(task_run_id)s,
                              %(state_name)s)

-- note_state --
-- Note the state that Prefect shows a task run in.
SELECT pgflow_prefect.note_state(%(run_id)s, %(step_slug)s, %(task_run_id)s, %(state_name)s, %(message)s)

-- reopen_run --
-- Make a failed run pending again.
SELECT id FROM pgflow.reopen_run(%(run_id)s)

-- repair_run --
-- Start what is ready and was not started.
SELECT id FROM pgflow.repair_run(%(run_id)s)

-- cancel_run --
-- End a run and its pending steps.
SELECT id FROM pgflow.cancel_run(%(run_id)s, %(reason)s)
