-- What PostgreSQL says of runs that are compared with Prefect.

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
