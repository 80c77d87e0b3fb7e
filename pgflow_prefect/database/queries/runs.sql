-- Runs, and the states of their steps.

-- read_run --
-- A run, the flow run that took it last, who holds it, and why it could not be taken.
SELECT id, workflow_slug, status, ended_as, payload::text, payload_problem, epoch, remaining, steps, error_message, created_at,
       finished_at, flow_run_id, held_by, recoveries, stale_writes, held, set_aside, next_try, is_older, logical_date,
       interval_start, interval_end, backfill_id
FROM pgflow_prefect.read_run(%(run_id)s, %(lease)s, %(with_payload)s)

-- read_end --
-- How a run stands, and the results of these steps if it is completed: one look at both.
SELECT id, status, ended_as, epoch, error_message, results FROM pgflow_prefect.read_end(%(run_id)s, %(step_slugs)s)

-- read_ends --
-- Likewise of several runs. What is asked of each is an element: its id and the slugs of its steps.
SELECT e.id, e.status, e.ended_as, e.epoch, e.error_message, e.results
FROM jsonb_to_recordset(%(asked)s::jsonb) AS a (run_id uuid, step_slugs text[]),
     LATERAL pgflow_prefect.read_end(a.run_id, a.step_slugs) AS e

-- list_runs --
-- The newest runs, of one workflow or of all; a run that was inserted by hand has no definition until it begins.
SELECT id, workflow_slug, status, ended_as, payload::text, payload_problem, epoch, remaining, steps, error_message, created_at,
       finished_at, flow_run_id, held_by, recoveries, stale_writes, held, logical_date, interval_start, interval_end,
       backfill_id
FROM pgflow_prefect.list_runs(%(workflow_slug)s, %(status)s, %(ended_as)s, %(since)s, %(limit)s, %(lease)s, %(with_payload)s)

-- read_clock --
-- The time now, by the clock that runs and steps go by.
SELECT clock_timestamp() AS now

-- list_step_states --
-- The steps of a run that have started, in the order of their start.
SELECT step_slug, status, ended_as, attempts, step_result::text, result_problem, error_message, created_at, started_at,
       finished_at, task_state, handler, tasks, tasks_completed, skip_reason, skip_message
FROM pgflow_prefect.list_step_states(%(run_id)s)

-- list_step_ends --
-- How these steps of a run ended, without their results, which may be large.
SELECT step_slug, status, ended_as, attempts, NULL AS step_result, error_message, created_at, started_at, finished_at, task_state,
       handler, first_claimed_at, tasks, tasks_completed, skip_reason, skip_message
FROM pgflow_prefect.list_step_ends(%(run_id)s, %(step_slugs)s)

-- list_failed_steps --
-- The steps of a run that have failed by themselves, in the order of their ends.
SELECT step_slug, error_message FROM pgflow_prefect.list_failed_steps(%(run_id)s)

-- list_flow_runs --
-- The flow runs that have taken a run.
SELECT flow_run_id FROM pgflow_prefect.list_flow_runs(%(run_id)s) AS flow_run_id

-- list_task_runs --
-- The latest task run of each step of a run.
SELECT step_slug, task_run_id FROM pgflow_prefect.list_task_runs(%(run_id)s)

-- read_results --
-- The results of these steps, by slug; only of those that are completed.
SELECT pgflow_prefect.read_results(%(run_id)s, %(step_slugs)s)::text AS results

-- reopen_run --
-- Make a failed run pending again.
SELECT pgflow_prefect.reopen_run(%(run_id)s)

-- repair_run --
-- Start what is ready and was not started.
SELECT pgflow_prefect.repair_run(%(run_id)s)

-- skip_step --
-- Skip a step by hand.
SELECT status, skip_reason, skip_message FROM pgflow_prefect.skip_step(%(run_id)s, %(step_slug)s, %(note)s, %(cascade)s)

-- cancel_run --
-- End a run and its pending steps.
SELECT pgflow_prefect.cancel_run(%(run_id)s, %(reason)s)

-- lock_run_first --
-- Wait for the run's lock in a savepoint, which a wait that is cut short can go back to.
SAVEPOINT pgflow_report; SELECT pgflow_prefect.lock_run(%(run_id)s); RELEASE SAVEPOINT pgflow_report

-- complete_pending_step --
-- Store a result, and tell whether it was this statement that did: start_step locks the run and returns the state that
-- the step is in under that lock, where no other transaction can complete it any more.
SELECT status, ended_as, error_message, accepted, skip_reason, skip_message
FROM pgflow_prefect.complete_pending_step(%(run_id)s, %(step_slug)s, %(task_index)s, %(result)s::jsonb, %(epoch)s,
                                          %(attempt)s, %(task_run_id)s, %(outcome)s::jsonb)

-- find_latest_run --
-- The run that began last; of several that began in one moment, one.
SELECT id FROM pgflow_prefect.find_latest_run() AS id

-- find_runs_between --
-- A few of the runs whose ids lie between two: more than one, where the beginning of an id is not unique.
SELECT id FROM pgflow_prefect.find_runs_between(%(first)s, %(last)s, %(limit)s) AS id
