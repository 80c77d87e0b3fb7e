-- Runs, and the states of their steps.

-- read_run --
-- A run, the flow run that took it last, who holds it, and why it could not be taken.
SELECT r.id, r.workflow_slug, r.status, CASE WHEN p.problem IS NULL THEN p.payload END AS payload,
       p.problem AS payload_problem, r.epoch, r.remaining, d.step_count AS steps, r.error_message,
       r.created_at, r.finished_at,
       (SELECT f.flow_run_id FROM pgflow_prefect.flow_runs f
        WHERE f.run_id = r.id ORDER BY f.epoch DESC LIMIT 1) AS flow_run_id,
       o.held_by, coalesce(o.recoveries, 0) AS recoveries, coalesce(o.stale_writes, 0) AS stale_writes,
       pgflow_prefect.how_held(o, r.epoch, %(lease)s) AS held, a.reason AS set_aside, a.next_try,
       pgflow_prefect.is_older(r.created_at, r.epoch, o, e) AS is_older
FROM pgflow.runs r
LEFT JOIN pgflow.definitions d ON d.id = r.definition_id
LEFT JOIN pgflow_prefect.owners o ON o.run_id = r.id
LEFT JOIN pgflow_prefect.enabled_workflows e ON e.workflow_slug = r.workflow_slug
LEFT JOIN pgflow_prefect.set_aside_runs a ON a.run_id = r.id AND a.epoch = r.epoch AND r.status = 'pending'
    AND coalesce(pgflow_prefect.how_held(o, r.epoch, %(lease)s), 'released') IN ('released', 'expired')
LEFT JOIN LATERAL (SELECT r.payload, pgflow.find_json_problem(r.payload, true) AS problem
                   WHERE %(with_payload)s OFFSET 0) p ON true
WHERE r.id = %(run_id)s

-- read_end --
-- How a run stands, and the results of these steps if it is completed: one look at both.
SELECT r.id, r.status, r.epoch, r.error_message,
       (SELECT coalesce(jsonb_object_agg(s.step_slug, s.step_result), '{}') FROM pgflow.step_states s
        WHERE s.run_id = r.id AND r.status = 'completed' AND s.step_slug = ANY (%(step_slugs)s)) AS results
FROM pgflow.runs r
WHERE r.id = %(run_id)s

-- list_runs --
-- The newest runs, of one workflow or of all; a run that somebody inserted has no definition until it begins.
SELECT r.id, r.workflow_slug, r.status, CASE WHEN p.problem IS NULL THEN p.payload END AS payload,
       p.problem AS payload_problem, r.epoch, r.remaining, d.step_count AS steps, r.error_message,
       r.created_at, r.finished_at,
       (SELECT f.flow_run_id FROM pgflow_prefect.flow_runs f
        WHERE f.run_id = r.id ORDER BY f.epoch DESC LIMIT 1) AS flow_run_id,
       o.held_by, coalesce(o.recoveries, 0) AS recoveries, coalesce(o.stale_writes, 0) AS stale_writes,
       pgflow_prefect.how_held(o, r.epoch, %(lease)s) AS held
FROM pgflow.runs r
LEFT JOIN pgflow.definitions d ON d.id = r.definition_id
LEFT JOIN pgflow_prefect.owners o ON o.run_id = r.id
LEFT JOIN LATERAL (SELECT r.payload, pgflow.find_json_problem(r.payload, true) AS problem
                   WHERE %(with_payload)s OFFSET 0) p ON true
WHERE (%(workflow_slug)s::text IS NULL OR r.workflow_slug = %(workflow_slug)s)
  AND (%(status)s::text IS NULL OR r.status = %(status)s)
  AND (%(since)s::timestamptz IS NULL OR r.created_at >= %(since)s)
ORDER BY r.created_at DESC NULLS LAST, r.id
LIMIT %(limit)s

-- read_clock --
-- The time now, by the clock that runs and steps go by.
SELECT clock_timestamp() AS now

-- list_step_states --
-- The steps of a run that have started, in the order of their start.
SELECT s.step_slug, s.status, s.attempts, CASE WHEN p.problem IS NULL THEN s.step_result END AS step_result,
       p.problem AS result_problem, s.error_message, s.created_at, s.started_at, s.finished_at,
       t.state_name AS task_state, t.handler
FROM pgflow.step_states s
LEFT JOIN pgflow_prefect.task_runs t ON t.run_id = s.run_id AND t.step_slug = s.step_slug
LEFT JOIN LATERAL (SELECT pgflow.find_json_problem(s.step_result, false) AS problem
                   WHERE s.step_result IS NOT NULL OFFSET 0) p ON true
WHERE s.run_id = %(run_id)s
ORDER BY s.created_at, s.step_slug

-- list_step_ends --
-- How these steps of a run ended, without their results, which may be large.
SELECT s.step_slug, s.status, s.attempts, NULL AS step_result, s.error_message, s.created_at, s.started_at, s.finished_at,
       t.state_name AS task_state, t.handler, t.first_claimed_at
FROM pgflow.step_states s
LEFT JOIN pgflow_prefect.task_runs t ON t.run_id = s.run_id AND t.step_slug = s.step_slug
WHERE s.run_id = %(run_id)s AND s.step_slug = ANY (%(step_slugs)s)

-- read_results --
-- The results of these steps, by slug; only of those that are completed.
SELECT coalesce(jsonb_object_agg(s.step_slug, s.step_result), '{}') AS results
FROM pgflow.step_states s
WHERE s.run_id = %(run_id)s AND s.status = 'completed' AND s.step_slug = ANY (%(step_slugs)s)

-- reopen_run --
-- Make a failed run pending again.
SELECT id FROM pgflow.reopen_run(%(run_id)s)

-- repair_run --
-- Start what is ready and was not started.
SELECT id FROM pgflow.repair_run(%(run_id)s)

-- cancel_run --
-- End a run and its pending steps.
SELECT id FROM pgflow.cancel_run(%(run_id)s, %(reason)s)

-- lock_run_first --
-- Wait for the run's lock in a savepoint, which a wait that is cut short can go back to.
SAVEPOINT pgflow_report; SELECT id FROM pgflow.lock_run(%(run_id)s); RELEASE SAVEPOINT pgflow_report

-- complete_pending_step --
-- Store a result, and tell whether it was this statement that did: start_step locks the run and returns the state that
-- the step is in under that lock, where nobody else can complete it any more.
SELECT done.status, done.error_message, found.status = 'pending' AND done.status = 'completed' AS accepted
FROM pgflow.start_step(%(run_id)s, %(step_slug)s) AS found
CROSS JOIN LATERAL pgflow_prefect.complete_step(found.run_id, found.step_slug, %(result)s::jsonb, %(epoch)s,
                                                %(attempt)s, %(task_run_id)s) AS done

-- find_latest_run --
-- The run that began last; of several that began in one moment, one.
SELECT r.id FROM pgflow.runs r ORDER BY r.created_at DESC NULLS LAST, r.id LIMIT 1

-- find_runs_between --
-- A few of the runs whose ids lie between two: more than one, where the beginning of an id is not unique.
SELECT r.id FROM pgflow.runs r WHERE r.id BETWEEN %(first)s AND %(last)s ORDER BY r.id LIMIT %(limit)s
