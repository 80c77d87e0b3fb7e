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
-- Every workflow with its size, its runs, and whether they are taken.
SELECT w.slug,
       (SELECT count(*) FROM pgflow.steps s WHERE s.workflow_slug = w.slug) AS steps,
       (SELECT count(*) FROM pgflow.deps d WHERE d.workflow_slug = w.slug) AS deps,
       coalesce(r.pending, 0) AS pending, coalesce(r.completed, 0) AS completed, coalesce(r.failed, 0) AS failed,
       e.enabled, b.bound
FROM pgflow.workflows w
LEFT JOIN (SELECT workflow_slug, jsonb_object_agg(kind, steps) AS bound
           FROM (SELECT workflow_slug, kind, count(*) AS steps FROM pgflow_prefect.bindings GROUP BY 1, 2) kinds
           GROUP BY workflow_slug) b ON b.workflow_slug = w.slug
LEFT JOIN pgflow_prefect.enabled_workflows e ON e.workflow_slug = w.slug
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

-- limit_waiting --
-- Until the transaction's end, wait no longer than this for a lock.
SELECT set_config('lock_timeout', '10s', true)

-- insert_workflow --
-- A new workflow; no row where it is there already.
INSERT INTO pgflow.workflows (slug) VALUES (%(workflow_slug)s) ON CONFLICT DO NOTHING RETURNING slug

-- lock_workflow --
-- Let nobody else edit a workflow, nor start a run of it. As strong as the deletion of a step needs it, and from the
-- start: a weaker lock, made stronger later, would deadlock with whoever inserts a step meanwhile.
SELECT slug FROM pgflow.workflows WHERE slug = %(workflow_slug)s FOR UPDATE

-- insert_steps --
-- Steps of a workflow.
INSERT INTO pgflow.steps (workflow_slug, slug)
SELECT %(workflow_slug)s, slug FROM unnest(%(steps)s::text[]) AS slug

-- insert_deps --
-- Deps of a workflow, in one statement: after each, the engine looks for cycles.
INSERT INTO pgflow.deps (workflow_slug, from_step_slug, to_step_slug)
SELECT %(workflow_slug)s, upstream, downstream
FROM unnest(%(upstream)s::text[], %(downstream)s::text[]) AS dep (upstream, downstream)

-- delete_steps --
-- Steps of a workflow, as far as no run needs them.
DELETE FROM pgflow.steps WHERE workflow_slug = %(workflow_slug)s AND slug = ANY (%(steps)s)

-- delete_deps --
-- Deps of a workflow.
DELETE FROM pgflow.deps d
USING unnest(%(upstream)s::text[], %(downstream)s::text[]) AS gone (upstream, downstream)
WHERE d.workflow_slug = %(workflow_slug)s AND d.from_step_slug = gone.upstream AND d.to_step_slug = gone.downstream

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
SELECT pgflow_prefect.link_flow_run(%(run_id)s, %(epoch)s, %(flow_run_id)s, %(held_by)s, %(queued)s) AS linked

-- release_run --
-- Hand a run back.
SELECT pgflow_prefect.release_run(%(run_id)s, %(epoch)s) AS released

-- extend_leases --
-- Extend leases, and hear how each run is held.
SELECT run_id, epoch, holds FROM pgflow_prefect.extend_leases(%(run_ids)s, %(epochs)s, %(lease)s)

-- listen --
-- Hear of runs that start, end or are handed back.
LISTEN pgflow_runs

-- enable_workflow --
-- Let workers and bridges take a workflow's new runs, or not.
SELECT workflow_slug, enabled, since FROM pgflow_prefect.enable_workflow(%(workflow_slug)s, %(enabled)s)

-- list_enabled --
-- The workflows that were enabled or disabled.
SELECT workflow_slug, enabled, since FROM pgflow_prefect.enabled_workflows ORDER BY workflow_slug

-- list_waiting_runs --
-- How many pending runs of each workflow nobody has ever taken, and the oldest one; disabled workflows left out.
SELECT r.workflow_slug, count(*) AS runs, (array_agg(r.id ORDER BY r.created_at))[1] AS first
FROM pgflow.runs r
LEFT JOIN pgflow_prefect.enabled_workflows e ON e.workflow_slug = r.workflow_slug
WHERE r.status = 'pending' AND coalesce(e.enabled, true)
  AND NOT EXISTS (SELECT FROM pgflow_prefect.owners o WHERE o.run_id = r.id)
GROUP BY r.workflow_slug

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
       pgflow_prefect.how_held(o, r.epoch, %(lease)s) AS held
FROM pgflow.runs r
LEFT JOIN pgflow_prefect.owners o ON o.run_id = r.id
WHERE r.id = %(run_id)s

-- list_runs --
-- The newest runs, of one workflow or of all.
SELECT r.id, r.workflow_slug, r.status, r.payload, r.epoch, r.remaining, r.error_message, r.created_at, r.finished_at,
       (SELECT f.flow_run_id FROM pgflow_prefect.flow_runs f
        WHERE f.run_id = r.id ORDER BY f.epoch DESC LIMIT 1) AS flow_run_id,
       o.held_by, coalesce(o.recoveries, 0) AS recoveries, coalesce(o.stale_writes, 0) AS stale_writes,
       pgflow_prefect.how_held(o, r.epoch, %(lease)s) AS held
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
       t.state_name AS task_state, t.handler
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
-- Count an attempt and get the step's input, or hear that somebody else does it.
SELECT status, attempt, payload, upstream_results, kind, target, options, waits, waited, began_at, ended_at, note
FROM pgflow_prefect.claim_step(%(run_id)s, %(step_slug)s, %(epoch)s, %(task_run_id)s, %(upstream)s, %(with_payload)s,
                               %(bound)s, %(has_function)s, %(handler)s)

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

-- complete_pending_step --
-- Store a result, and tell whether it was this statement that did: start_step locks the run and returns the state that
-- the step is in under that lock, where nobody else can complete it any more.
SELECT done.status, done.error_message, found.status = 'pending' AND done.status = 'completed' AS accepted
FROM pgflow.start_step(%(run_id)s, %(step_slug)s) AS found
CROSS JOIN LATERAL pgflow_prefect.complete_step(found.run_id, found.step_slug, %(result)s::jsonb, %(epoch)s,
                                                %(attempt)s, %(task_run_id)s) AS done

-- list_unsettled --
-- Runs that somebody has taken and that Prefect was not yet seen to agree on, by id.
SELECT o.run_id
FROM pgflow_prefect.owners o
WHERE (%(everything)s OR NOT o.settled) AND (%(after)s::uuid IS NULL OR o.run_id > %(after)s)
ORDER BY o.run_id
LIMIT %(limit)s

-- read_unsettled --
-- These runs with all their flow runs, as far as somebody has taken them.
SELECT r.id, r.workflow_slug, r.status, r.error_message, r.finished_at, o.epoch, o.taken_at, clock_timestamp() AS now,
       CASE WHEN o.epoch = r.epoch THEN o.flow_run_id END AS flow_run_id,
       pgflow_prefect.how_held(o, r.epoch, %(lease)s) AS held,
       ARRAY(SELECT DISTINCT f.flow_run_id FROM pgflow_prefect.flow_runs f WHERE f.run_id = r.id) AS flow_run_ids
FROM pgflow_prefect.owners o
JOIN pgflow.runs r ON r.id = o.run_id
WHERE o.run_id = ANY (%(run_ids)s)
ORDER BY r.id

-- list_unsettled_steps --
-- The steps of these runs that a task run has claimed; without their results, which may be large.
SELECT t.run_id, t.step_slug, s.status, s.error_message, t.task_run_id
FROM pgflow_prefect.task_runs t
JOIN pgflow.step_states s ON s.run_id = t.run_id AND s.step_slug = t.step_slug
WHERE t.run_id = ANY (%(run_ids)s)
ORDER BY s.created_at, t.step_slug

-- settle_runs --
-- Look no further at runs that have ended, unless somebody has taken them again meanwhile.
UPDATE pgflow_prefect.owners o
SET settled = true
FROM unnest(%(run_ids)s::uuid[], %(epochs)s::int[]) AS seen (run_id, epoch)
JOIN pgflow.runs r ON r.id = seen.run_id AND r.status <> 'pending'
WHERE o.run_id = seen.run_id AND o.epoch = seen.epoch AND NOT o.settled
RETURNING o.run_id

-- find_known --
-- Which of these runs exist, and which of these flow runs have ever taken one.
SELECT ARRAY(SELECT r.id FROM pgflow.runs r WHERE r.id = ANY (%(run_ids)s)) AS run_ids,
       ARRAY(SELECT f.flow_run_id FROM pgflow_prefect.flow_runs f
             WHERE f.flow_run_id = ANY (%(flow_run_ids)s)) AS flow_run_ids

-- watch_steps --
-- Of the steps that others do, those that need not be waited for any more.
SELECT task_run_id, outcome, message, began_at, ended_at
FROM pgflow_prefect.watch_steps(%(run_ids)s, %(step_slugs)s, %(epochs)s, %(task_run_ids)s, %(bound)s,
                                %(have_function)s)

-- list_bindings --
-- What the steps of a workflow are bound to, where a row says so.
SELECT step_slug, kind, target, options FROM pgflow_prefect.bindings
WHERE workflow_slug = %(workflow_slug)s ORDER BY step_slug

-- bind_step --
-- Say who does a step; no kind: no row.
SELECT pgflow_prefect.bind_step(%(workflow_slug)s, %(step_slug)s, %(kind)s, %(target)s, %(options)s::jsonb) AS changed

-- undo_binding --
-- Take back the last change of a step's binding.
SELECT pgflow_prefect.undo_binding(%(workflow_slug)s, %(step_slug)s) AS changed

-- observe_workflow --
-- Bind all steps to others.
SELECT pgflow_prefect.observe_workflow(%(workflow_slug)s) AS changed

-- list_binding_changes --
-- Who changed what, the latest first.
SELECT step_slug, before, after, changed_at, changed_by, undone_at, undone_by
FROM pgflow_prefect.binding_changes
WHERE workflow_slug = %(workflow_slug)s AND (%(step_slug)s::text IS NULL OR step_slug = %(step_slug)s)
ORDER BY id DESC LIMIT %(limit)s

-- list_bound_workflows --
-- The workflows that need no Python: each of their steps has a row, and none of those says Python.
SELECT w.slug FROM pgflow.workflows w
WHERE EXISTS (SELECT FROM pgflow_prefect.bindings b WHERE b.workflow_slug = w.slug)
  AND NOT EXISTS (
      SELECT FROM pgflow.steps s
      LEFT JOIN pgflow_prefect.bindings b ON b.workflow_slug = s.workflow_slug AND b.step_slug = s.slug
      WHERE s.workflow_slug = w.slug AND (b.kind IS NULL OR b.kind = 'python'))
ORDER BY w.slug

-- find_functions --
-- What these functions of jsonb return; of one that does not exist, nothing.
SELECT wanted.name, f.returns
FROM unnest(%(names)s::text[], %(schemas)s::text[], %(functions)s::text[]) AS wanted (name, schema, function)
CROSS JOIN LATERAL (
    SELECT pg_catalog.format_type(p.prorettype, NULL) || CASE WHEN p.proretset THEN ' rows' ELSE '' END AS returns
    FROM pg_catalog.pg_proc p
    JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
    WHERE n.nspname = wanted.schema AND p.proname = wanted.function AND p.prokind = 'f'
      AND pg_catalog.has_function_privilege(p.oid, 'EXECUTE')
      AND p.proargtypes[0] = 'jsonb'::regtype AND p.pronargs - p.pronargdefaults <= 1 AND p.pronargs >= 1
    ORDER BY p.pronargs LIMIT 1
) f

-- read_input --
-- What a claim would give, without claiming.
SELECT payload, upstream_results FROM pgflow_prefect.read_input(%(run_id)s, %(step_slug)s, %(upstream)s)

-- report_shadow --
-- Note what came of a handler that ran beside somebody else's work.
SELECT pgflow_prefect.report_shadow(%(run_id)s, %(step_slug)s, %(outcome)s, %(details)s, %(seconds)s)

-- list_shadows --
-- What came of the shadows of a workflow, by step.
SELECT step_slug, count(*) FILTER (WHERE outcome = 'same') AS same,
       count(*) FILTER (WHERE outcome = 'different') AS different,
       count(*) FILTER (WHERE outcome = 'failed') AS failed,
       percentile_cont(0.5) WITHIN GROUP (ORDER BY seconds) AS seconds,
       coalesce((SELECT l.details FROM pgflow_prefect.shadow_reports l
                 WHERE l.workflow_slug = s.workflow_slug AND l.step_slug = s.step_slug AND l.outcome <> 'same'
                 ORDER BY l.reported_at DESC LIMIT 1), '{}') AS details
FROM pgflow_prefect.shadow_reports s
WHERE workflow_slug = %(workflow_slug)s
GROUP BY workflow_slug, step_slug ORDER BY step_slug

-- is_awaited --
-- Of the consumers of queues: whether a step still waits for the report of this attempt. No row: the run is gone.
SELECT r.status = 'pending' AND s.status = 'pending' AND s.attempts = %(attempt)s AND s.started_at IS NOT NULL
       AS awaited
FROM pgflow.step_states s
JOIN pgflow.runs r ON r.id = s.run_id
WHERE s.run_id = %(run_id)s AND s.step_slug = %(step_slug)s

-- report_completion --
-- Of the consumers of queues: store a result, for whichever owner the run has.
SELECT (pgflow.complete_step(%(run_id)s, %(step_slug)s, %(result)s::jsonb, NULL, %(attempt)s)).status

-- report_failure --
-- Of the consumers of queues: fail a step and its run.
SELECT (pgflow.fail_step(%(run_id)s, %(step_slug)s, %(error_message)s, NULL, %(attempt)s)).status
