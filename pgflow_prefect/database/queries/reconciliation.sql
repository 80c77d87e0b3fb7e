-- What PostgreSQL says of runs that are compared with Prefect.

-- list_unsettled --
-- Runs that a process has taken and that Prefect was not yet seen to agree on, by id.
SELECT run_id FROM pgflow_prefect.list_unsettled(%(everything)s, %(after)s, %(limit)s) AS run_id

-- read_unsettled --
-- These runs with all their flow runs, as far as a process has taken them.
SELECT id, workflow_slug, status, ended_as, is_given_up, error_message, finished_at, epoch, taken_at, now, flow_run_id, held, flow_run_ids
FROM pgflow_prefect.read_unsettled(%(run_ids)s, %(lease)s)

-- list_unsettled_steps --
-- The steps of these runs that a task run has claimed; without their results, which may be large.
SELECT run_id, step_slug, task_index, status, ended_as, error_message, task_run_id
FROM pgflow_prefect.list_unsettled_steps(%(run_ids)s)

-- settle_runs --
-- Look no further at runs that have ended, unless a process has taken them again meanwhile.
SELECT run_id FROM pgflow_prefect.settle_runs(%(run_ids)s, %(epochs)s) AS run_id

-- find_known --
-- Which of these runs exist, and which of these flow runs have ever taken one.
SELECT known_runs, known_flow_runs FROM pgflow_prefect.find_known(%(run_ids)s, %(flow_run_ids)s)
