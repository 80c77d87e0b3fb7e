-- Reports of queue workers.

-- find_handover --
-- Of the consumers of queues: whether a step still waits for the report of this attempt, and who the attempt was
-- claimed for. No row: the run is gone.
SELECT awaited, workflow_slug, handler FROM pgflow_prefect.find_handover(%(run_id)s, %(step_slug)s, %(task_index)s,
                                                                         %(attempt)s)

-- report_completion --
-- Of the consumers of queues: store a result, for whichever owner the run has.
SELECT pgflow_prefect.report_completion(%(run_id)s, %(step_slug)s, %(task_index)s, %(result)s::jsonb,
                                        %(attempt)s, %(outcome)s::jsonb) AS status

-- report_failure --
-- Of the consumers of queues: fail a step and its run.
SELECT pgflow_prefect.report_failure(%(run_id)s, %(step_slug)s, %(task_index)s, %(error_message)s, %(attempt)s) AS status

-- find_item_handover --
-- Likewise of an item of a map.
SELECT awaited, workflow_slug, handler FROM pgflow_prefect.find_item_handover(%(run_id)s, %(step_slug)s, %(item_index)s,
                                                                              %(attempt)s)

-- read_item_input --
-- What the handler of an item gets, without what its map maps over.
SELECT payload::text, upstream_results::text, logical_date, interval_start, interval_end
FROM pgflow_prefect.read_item_input(%(run_id)s, %(step_slug)s, %(item_index)s)

-- report_item --
-- Of the consumers of queues: how an attempt of an item has ended, for whichever owner the run has.
SELECT pgflow_prefect.report_item(%(run_id)s, %(step_slug)s, %(item_index)s, %(attempt)s, %(result)s::jsonb,
                                  %(outcome)s::jsonb, %(error_message)s) AS status
