-- Reports of queue workers.

-- find_handover --
-- Of the consumers of queues: whether a step still waits for the report of this attempt, and who the attempt was
-- claimed for. No row: the run is gone.
SELECT r.status = 'pending' AND s.status = 'pending' AND s.attempts = %(attempt)s AND s.started_at IS NOT NULL
       AS awaited, r.workflow_slug, t.handler
FROM pgflow.step_states s
JOIN pgflow.runs r ON r.id = s.run_id
LEFT JOIN pgflow_prefect.task_runs t
       ON t.run_id = s.run_id AND t.step_slug = s.step_slug AND t.attempt = %(attempt)s
WHERE s.run_id = %(run_id)s AND s.step_slug = %(step_slug)s

-- report_completion --
-- Of the consumers of queues: store a result, for whichever owner the run has.
SELECT (pgflow.complete_step(%(run_id)s, %(step_slug)s, %(result)s::jsonb, NULL, %(attempt)s)).status

-- report_failure --
-- Of the consumers of queues: fail a step and its run.
SELECT (pgflow.fail_step(%(run_id)s, %(step_slug)s, %(error_message)s, NULL, %(attempt)s)).status
