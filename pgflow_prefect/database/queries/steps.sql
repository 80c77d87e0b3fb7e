-- One step: its claim, its report, and waiting for external.

-- claim_step --
-- Count an attempt and get the step's input, or hear that an external worker does it.
SELECT status, attempt, payload::text, upstream_results::text, kind, target, options, waits, waited, began_at, ended_at,
       note, skip_reason, logical_date, interval_start, interval_end
FROM pgflow_prefect.claim_step(%(run_id)s, %(step_slug)s, %(task_index)s, %(epoch)s, %(task_run_id)s, %(upstream)s,
                               %(with_payload)s, %(bound)s, %(has_function)s, %(handler)s)

-- complete_step --
-- Store a result. The result itself need not come back: the step that reads it gets it with its claim.
SELECT status, ended_as::text, error_message, skip_reason, pgflow_prefect.describe_skip(c) AS skip_message
FROM pgflow_prefect.complete_step(%(run_id)s, %(step_slug)s, %(task_index)s, %(result)s::jsonb, %(epoch)s, %(attempt)s,
                                  %(task_run_id)s, %(outcome)s::jsonb) AS c

-- find_cached --
-- The result of an earlier run that a step takes over.
SELECT source_run_id AS run_id, result::text
FROM pgflow_prefect.find_cached(%(run_id)s, %(step_slug)s, %(task_index)s, %(cache_key)s)

-- perform_tasks --
-- Completions, failures and claims of one or several runs, in one transaction: a row for each. The time-out is set for
-- this transaction alone, before the function begins.
WITH bound AS MATERIALIZED (SELECT pg_catalog.set_config('lock_timeout', %(lock_timeout)s, true) AS lock_timeout)
SELECT p.outcome, p.status, p.ended_as, p.error_message, p.attempt, p.payload::text, p.upstream_results::text, p.kind,
       p.target, p.options, p.waits, p.waited, p.began_at, p.ended_at, p.note, p.skip_reason, p.logical_date,
       p.interval_start, p.interval_end
FROM bound, LATERAL pgflow_prefect.perform_tasks(
    CASE WHEN bound.lock_timeout IS NOT NULL THEN %(elements)s::jsonb END) AS p

-- fail_step --
-- Fail a step and its run.
SELECT status, ended_as::text, error_message, skip_reason, pgflow_prefect.describe_skip(f) AS skip_message
FROM pgflow_prefect.fail_step(%(run_id)s, %(step_slug)s, %(task_index)s, %(error_message)s, %(epoch)s, %(attempt)s,
                              %(task_run_id)s, %(state_name)s) AS f

-- note_state --
-- Note the state that Prefect shows a task run in.
SELECT pgflow_prefect.note_state(%(run_id)s, %(step_slug)s, %(task_index)s, %(task_run_id)s, %(state_name)s,
                                 %(message)s)

-- stay_open --
-- Let nothing but the step's own time-out end the transaction of its handler, which may do other work meanwhile.
-- Not set_config(), which would take a snapshot: the handler may still choose an isolation level.
SET LOCAL idle_in_transaction_session_timeout = 0

-- stay_open_17 --
-- Likewise, since PostgreSQL 17.
SET LOCAL idle_in_transaction_session_timeout = 0; SET LOCAL transaction_timeout = 0

-- read_input --
-- What a claim would give, without claiming.
SELECT payload::text, upstream_results::text, logical_date, interval_start, interval_end
FROM pgflow_prefect.read_input(%(run_id)s, %(step_slug)s, %(task_index)s, %(upstream)s)

-- watch_steps --
-- Of the steps that others do, those that need not be waited for any more.
SELECT task_run_id, outcome, message, began_at, ended_at
FROM pgflow_prefect.watch_steps(%(run_ids)s, %(step_slugs)s, %(task_indexes)s, %(epochs)s, %(task_run_ids)s, %(bound)s,
                                %(have_function)s)
