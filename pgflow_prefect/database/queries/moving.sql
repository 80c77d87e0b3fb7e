-- Flows of the released pgflow that Prefect executes.

-- move_flow --
-- Move a whole flow to Prefect, by pgflow's own switches.
SELECT changed, workers, functions, has_functions, runs FROM pgflow_prefect.move_flow(%(workflow_slug)s)

-- move_flow_back --
-- Give a flow back to pgflow's own workers.
SELECT changed, workers, functions, has_functions, runs FROM pgflow_prefect.move_flow_back(%(workflow_slug)s)

-- list_moved_flows --
-- The flows that Prefect executes.
SELECT workflow_slug, moved_at, moved_by, functions FROM pgflow_prefect.list_moved_flows()

-- complete_task --
-- Complete a task, and hear how its step stands.
SELECT status, ended_as, error_message, skip_reason, skip_message
FROM pgflow_prefect.complete_task(%(run_id)s, %(step_slug)s, %(task_index)s, %(result)s::jsonb, %(epoch)s, %(attempt)s,
                                  %(task_run_id)s, %(outcome)s::jsonb)

-- fail_task --
-- Fail a task, and hear whether pgflow tries it again.
SELECT status, ended_as, error_message, skip_reason, skip_message, retry_after
FROM pgflow_prefect.fail_task(%(run_id)s, %(step_slug)s, %(task_index)s, %(error_message)s, %(epoch)s, %(attempt)s,
                              %(task_run_id)s, %(state_name)s)

-- end_given_up_tasks --
-- Fail tasks that pgflow has given up.
SELECT workflow_slug, run_id, step_slug, task_index, run_status FROM pgflow_prefect.end_given_up_tasks(%(limit)s)

-- list_lost_messages --
-- Tasks whose message is nowhere.
SELECT workflow_slug, run_id, step_slug, task_index FROM pgflow_prefect.list_lost_messages(%(limit)s)

-- restore_messages --
-- Rebuild the messages of such tasks.
SELECT workflow_slug, run_id, step_slug, task_index FROM pgflow_prefect.restore_messages(%(limit)s)
