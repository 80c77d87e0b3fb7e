-- pgflow_prefect: reading runs and their steps, ending and reopening them, and what diagnosis and pruning ask.
--
-- A part of the contract of ../CONTRACT.md for the classic schema. Needs pgflow.sql, classic/pgflow_prefect.sql,
-- classic/recording.sql, classic/schedules.sql, classic/mirror.sql, and classic/definitions.sql, whose head says how
-- these functions are planned. This script comes last, because it sets the version.
-- psql -d DATABASE -f runs.sql; one transaction, safe to run again.

BEGIN ISOLATION LEVEL READ COMMITTED; -- an older snapshot would not show what another session has just installed

SET LOCAL lock_timeout = '10s';
SET LOCAL statement_timeout = 0;
SET LOCAL client_min_messages = warning;
SET LOCAL pgflow.script_version = 6;

DO $guard$
BEGIN
    IF to_regprocedure('pgflow_prefect.load_definitions(text[])') IS NULL
       OR to_regprocedure('pgflow_prefect.is_unshown(uuid)') IS NULL
       OR to_regprocedure('pgflow_prefect.advance_backfills(int)') IS NULL
       OR to_regprocedure('pgflow_prefect.read_schedule(uuid)') IS NULL
       OR to_regprocedure('pgflow_prefect.list_mirrors()') IS NULL THEN
        RAISE EXCEPTION 'the schema pgflow_prefect is missing or old'
            USING HINT = 'Run pgflow.sql, and classic/pgflow_prefect.sql, definitions.sql, recording.sql, schedules.sql, '
                         'backfills.sql and mirror.sql first.';
    END IF;
    PERFORM set_config('transaction_timeout', '0', true)
    WHERE current_setting('transaction_timeout', true) <> '0';
    PERFORM pgflow.lock_schema('pgflow_prefect');
    IF (SELECT max(substring(p.prosrc FROM '[0-9]+')::int) FROM pg_catalog.pg_proc p
        WHERE p.pronamespace = 'pgflow_prefect'::regnamespace AND p.proname = 'adapter_version') > 10 THEN
        RAISE EXCEPTION 'the schema pgflow_prefect has a later version than 10, and this script is of version 10'
            USING ERRCODE = 'object_not_in_prerequisite_state',
                  HINT = 'Upgrade the program: pip install --upgrade pgflow-prefect';
    END IF;
END
$guard$;


------------------------------------------------------------------------------------------------------------
-- Reading runs
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow_prefect.read_run(run_id uuid, lease double precision, with_payload boolean)
RETURNS TABLE (id uuid, workflow_slug text, status text, ended_as text, payload jsonb, payload_problem text, epoch int,
               remaining int, steps int, error_message text, created_at timestamptz, finished_at timestamptz,
               flow_run_id uuid, held_by text, recoveries int, stale_writes bigint, held text, set_aside text,
               next_try timestamptz, is_older boolean, logical_date timestamptz, interval_start timestamptz,
               interval_end timestamptz, backfill_id bigint)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT r.id, r.workflow_slug, r.status, r.ended_as::text, CASE WHEN p.problem IS NULL THEN p.payload END,
               p.problem, r.epoch, r.remaining, d.step_count, r.error_message, r.created_at, r.finished_at,
               (SELECT f.flow_run_id FROM pgflow_prefect.flow_runs f
                WHERE f.run_id = r.id ORDER BY f.epoch DESC LIMIT 1),
               o.held_by, coalesce(o.recoveries, 0), coalesce(o.stale_writes, 0),
               pgflow_prefect.how_held(o, r.epoch, read_run.lease), a.reason, a.next_try,
               pgflow_prefect.is_older(r.created_at, r.epoch, o, e), r.logical_date, lower(r.data_interval),
               upper(r.data_interval), r.backfill_id
        FROM pgflow.runs r
        LEFT JOIN pgflow.definitions d ON d.id = r.definition_id
        LEFT JOIN pgflow_prefect.owners o ON o.run_id = r.id
        LEFT JOIN pgflow_prefect.enabled_workflows e ON e.workflow_slug = r.workflow_slug
        LEFT JOIN pgflow_prefect.set_aside_runs a ON a.run_id = r.id AND a.epoch = r.epoch AND r.status = 'pending'
            AND coalesce(pgflow_prefect.how_held(o, r.epoch, read_run.lease), 'released') IN ('released', 'expired')
        LEFT JOIN LATERAL (SELECT r.payload, pgflow.find_json_problem(r.payload, true) AS problem
                           WHERE read_run.with_payload OFFSET 0) p ON true
        WHERE r.id = read_run.run_id;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.read_run(uuid, double precision, boolean) IS
    'A run, its latest flow run, who holds it, and why it could not be taken. No row: there is no such run.';


CREATE OR REPLACE FUNCTION pgflow_prefect.list_runs(
    only_workflow text, only_status text, only_ended_as text, since timestamptz, at_most int, lease double precision,
    with_payload boolean
) RETURNS TABLE (id uuid, workflow_slug text, status text, ended_as text, payload jsonb, payload_problem text,
               epoch int, remaining int, steps int, error_message text, created_at timestamptz, finished_at timestamptz,
               flow_run_id uuid, held_by text, recoveries int, stale_writes bigint, held text,
               logical_date timestamptz, interval_start timestamptz, interval_end timestamptz, backfill_id bigint)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT r.id, r.workflow_slug, r.status, r.ended_as::text, CASE WHEN p.problem IS NULL THEN p.payload END,
               p.problem, r.epoch, r.remaining, d.step_count, r.error_message, r.created_at, r.finished_at,
               (SELECT f.flow_run_id FROM pgflow_prefect.flow_runs f
                WHERE f.run_id = r.id ORDER BY f.epoch DESC LIMIT 1),
               o.held_by, coalesce(o.recoveries, 0), coalesce(o.stale_writes, 0),
               pgflow_prefect.how_held(o, r.epoch, list_runs.lease), r.logical_date, lower(r.data_interval),
               upper(r.data_interval), r.backfill_id
        FROM pgflow.runs r
        LEFT JOIN pgflow.definitions d ON d.id = r.definition_id
        LEFT JOIN pgflow_prefect.owners o ON o.run_id = r.id
        LEFT JOIN LATERAL (SELECT r.payload, pgflow.find_json_problem(r.payload, true) AS problem
                           WHERE list_runs.with_payload OFFSET 0) p ON true
        WHERE (list_runs.only_workflow IS NULL OR r.workflow_slug = list_runs.only_workflow)
          AND (list_runs.only_status IS NULL OR r.status = list_runs.only_status)
          AND (list_runs.only_ended_as IS NULL OR r.ended_as::text = list_runs.only_ended_as)
          AND (list_runs.since IS NULL OR r.created_at >= list_runs.since)
        ORDER BY r.created_at DESC NULLS LAST, r.id
        LIMIT list_runs.at_most;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_runs(text, text, text, timestamptz, int, double precision, boolean) IS
    'The newest runs: of one workflow, in one status, ended so, begun since then; NULL: of all. A run that was '
    'inserted by hand has no number of steps until it begins.';


CREATE OR REPLACE FUNCTION pgflow_prefect.read_end(run_id uuid, step_slugs text[])
RETURNS TABLE (id uuid, status text, ended_as text, epoch int, error_message text, results jsonb)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY -- one look at both
        SELECT r.id, r.status, r.ended_as::text, r.epoch, r.error_message,
               (SELECT coalesce(jsonb_object_agg(s.step_slug, s.step_result), '{}') FROM pgflow.step_states s
                WHERE s.run_id = r.id AND r.status = 'completed' AND s.step_slug = ANY (read_end.step_slugs)
                  AND s.status = 'completed' AND s.skip_reason IS NULL)
        FROM pgflow.runs r
        WHERE r.id = read_end.run_id;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.read_end(uuid, text[]) IS
    'How a run stands, and the results of these steps if it is completed, without those that were skipped. No row: there is '
    'no such run.';


CREATE OR REPLACE FUNCTION pgflow_prefect.find_latest_run() RETURNS SETOF uuid
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    RETURN QUERY SELECT r.id FROM pgflow.runs r ORDER BY r.created_at DESC NULLS LAST, r.id LIMIT 1;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.find_latest_run() IS
    'The run that began last; of several that began in one moment, one.';


CREATE OR REPLACE FUNCTION pgflow_prefect.find_runs_between(first uuid, last uuid, at_most int) RETURNS SETOF uuid
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    RETURN QUERY
        SELECT r.id FROM pgflow.runs r
        WHERE r.id BETWEEN find_runs_between.first AND find_runs_between.last
        ORDER BY r.id
        LIMIT find_runs_between.at_most;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.find_runs_between(uuid, uuid, int) IS
    'Runs whose ids lie between two, both included: several where the beginning of an id is not unique.';


CREATE OR REPLACE FUNCTION pgflow_prefect.list_waiting_runs()
RETURNS TABLE (workflow_slug text, runs bigint, first uuid)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT r.workflow_slug, count(*), (array_agg(r.id ORDER BY r.created_at))[1]
        FROM pgflow.runs r
        LEFT JOIN pgflow_prefect.enabled_workflows e ON e.workflow_slug = r.workflow_slug
        WHERE r.status = 'pending' AND coalesce(e.enabled, true)
          AND NOT EXISTS (SELECT FROM pgflow_prefect.owners o WHERE o.run_id = r.id)
        GROUP BY r.workflow_slug;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_waiting_runs() IS
    'The number of pending runs of each enabled workflow that no process has ever taken, and the oldest of them.';


CREATE OR REPLACE FUNCTION pgflow_prefect.list_older_runs(workflow_slugs text[], lease double precision)
RETURNS TABLE (id uuid, workflow_slug text)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT r.id, r.workflow_slug
        FROM pgflow.runs r
        JOIN pgflow_prefect.enabled_workflows e ON e.workflow_slug = r.workflow_slug AND e.enabled
        LEFT JOIN pgflow_prefect.owners o ON o.run_id = r.id
        WHERE r.workflow_slug = ANY (list_older_runs.workflow_slugs) AND r.status = 'pending'
          AND pgflow_prefect.is_older(r.created_at, r.epoch, o, e)
          AND coalesce(pgflow_prefect.how_held(o, r.epoch, list_older_runs.lease), 'released') IN ('released', 'expired')
        ORDER BY r.created_at NULLS FIRST, r.id;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_older_runs(text[], double precision) IS
    'Pending runs that began before their workflow was enabled, so that services take them only if they adopt. '
    'The oldest first.';


------------------------------------------------------------------------------------------------------------
-- Reading steps
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow_prefect.list_step_states(run_id uuid)
RETURNS TABLE (step_slug text, status text, ended_as text, attempts int, step_result jsonb, result_problem text,
               error_message text, created_at timestamptz, started_at timestamptz, finished_at timestamptz,
               task_state text, handler text, tasks int, tasks_completed int, skip_reason text,
               skip_message text)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT s.step_slug, s.status, s.ended_as::text, s.attempts,
               CASE WHEN p.problem IS NULL THEN s.step_result END, p.problem, s.error_message, s.created_at,
               s.started_at, s.finished_at, t.state_name, t.handler, m.total, m.total - m.remaining - m.failed, s.skip_reason,
               pgflow_prefect.describe_skip(s)
        FROM pgflow.step_states s
        LEFT JOIN pgflow.step_maps m ON m.run_id = s.run_id AND m.step_slug = s.step_slug
        LEFT JOIN pgflow_prefect.task_runs t ON t.run_id = s.run_id AND t.step_slug = s.step_slug AND t.task_index = 0
        LEFT JOIN LATERAL (SELECT pgflow.find_json_problem(s.step_result, false) AS problem
                           WHERE s.step_result IS NOT NULL OFFSET 0) p ON true
        WHERE s.run_id = list_step_states.run_id
        ORDER BY s.created_at, s.step_slug;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_step_states(uuid) IS
    'The steps of a run that have started, in the order of their start, with their results.';


CREATE OR REPLACE FUNCTION pgflow_prefect.list_relatives(of_run uuid, at_most int)
RETURNS TABLE (is_parent boolean, run_id uuid, workflow_slug text, status text, ended_as text, step_slug text,
               item_index int, attempt int)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT true, p.id, p.workflow_slug, p.status, p.ended_as::text, r.parent_step_slug, r.parent_item, r.parent_attempt
        FROM pgflow.runs r JOIN pgflow.runs p ON p.id = r.parent_run_id
        WHERE r.id = list_relatives.of_run;
    RETURN QUERY
        SELECT false, c.id, c.workflow_slug, c.status, c.ended_as::text, c.parent_step_slug, c.parent_item,
               c.parent_attempt
        FROM pgflow.runs c WHERE c.parent_run_id = list_relatives.of_run
        ORDER BY c.created_at DESC, c.parent_item DESC LIMIT at_most;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_relatives(uuid, int) IS
    'The parent of a run that is a child, and then its own children, the latest first, with the step and the item that each '
    'child is.';


CREATE OR REPLACE FUNCTION pgflow_prefect.list_step_ends(run_id uuid, step_slugs text[])
RETURNS TABLE (step_slug text, status text, ended_as text, attempts int, error_message text, created_at timestamptz,
               started_at timestamptz, finished_at timestamptz, task_state text, handler text,
               first_claimed_at timestamptz, tasks int, tasks_completed int, skip_reason text,
               skip_message text)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT s.step_slug, s.status, s.ended_as::text, s.attempts, s.error_message, s.created_at, s.started_at,
               s.finished_at, t.state_name, t.handler, t.first_claimed_at, m.total, m.total - m.remaining - m.failed,
               s.skip_reason, pgflow_prefect.describe_skip(s)
        FROM pgflow.step_states s
        LEFT JOIN pgflow.step_maps m ON m.run_id = s.run_id AND m.step_slug = s.step_slug
        LEFT JOIN pgflow_prefect.task_runs t ON t.run_id = s.run_id AND t.step_slug = s.step_slug AND t.task_index = 0
        WHERE s.run_id = list_step_ends.run_id AND s.step_slug = ANY (list_step_ends.step_slugs);
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_step_ends(uuid, text[]) IS
    'How these steps of a run ended, without their results, which may be large; only of steps that have started.';


CREATE OR REPLACE FUNCTION pgflow_prefect.list_failed_steps(run_id uuid) RETURNS TABLE (step_slug text, error_message text)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT s.step_slug, s.error_message FROM pgflow.step_states s
        WHERE s.run_id = list_failed_steps.run_id AND s.status = 'failed'
          AND s.skip_reason IS DISTINCT FROM 'dependency_failed'
        ORDER BY s.finished_at, s.step_slug;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_failed_steps(uuid) IS
    'The steps of a run that have failed by themselves, in the order of their ends, with their errors.';


CREATE OR REPLACE FUNCTION pgflow_prefect.list_flow_runs(run_id uuid) RETURNS SETOF uuid
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    RETURN QUERY
        SELECT f.flow_run_id FROM pgflow_prefect.flow_runs f WHERE f.run_id = list_flow_runs.run_id ORDER BY f.epoch;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_flow_runs(uuid) IS
    'The flow runs that have taken a run, in the order in which they took it.';


CREATE OR REPLACE FUNCTION pgflow_prefect.list_task_runs(run_id uuid) RETURNS TABLE (step_slug text, task_run_id uuid)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT t.step_slug, t.task_run_id FROM pgflow_prefect.task_runs t
        WHERE t.run_id = list_task_runs.run_id AND t.task_index = 0;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_task_runs(uuid) IS
    'The latest task run of each step of a run that was claimed.';


CREATE OR REPLACE FUNCTION pgflow_prefect.read_results(run_id uuid, step_slugs text[]) RETURNS jsonb
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    RETURN (SELECT coalesce(jsonb_object_agg(s.step_slug, s.step_result), '{}')
            FROM pgflow.step_states s
            WHERE s.run_id = read_results.run_id AND s.status = 'completed' AND s.skip_reason IS NULL
              AND s.step_slug = ANY (read_results.step_slugs));
END
$$;

COMMENT ON FUNCTION pgflow_prefect.read_results(uuid, text[]) IS
    'The results of those of these steps that are completed and were not skipped, by slug.';


CREATE OR REPLACE FUNCTION pgflow_prefect.check_result(result jsonb) RETURNS jsonb
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
BEGIN
    RETURN pgflow.check_json(check_result.result, false, 'the result of the function');
END
$$;

COMMENT ON FUNCTION pgflow_prefect.check_result(jsonb) IS
    'Returns the result of a function that does a step; raises an error if the result is beyond the limits.';


------------------------------------------------------------------------------------------------------------
-- Moving runs. No SET clauses: triggers of users on runs and step_states run inside.
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow_prefect.lock_run(run_id uuid) RETURNS uuid
LANGUAGE plpgsql VOLATILE
AS $$
BEGIN
    RETURN (pgflow.lock_run(lock_run.run_id)).id;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.lock_run(uuid) IS
    'Locks a run''s row until the transaction ends, as the transitions of the run do.';


CREATE OR REPLACE FUNCTION pgflow_prefect.reopen_run(run_id uuid) RETURNS uuid
LANGUAGE plpgsql VOLATILE
AS $$
BEGIN
    PERFORM pgflow_prefect.refuse_mirrored(reopen_run.run_id, 'reopened');
    RETURN (pgflow.reopen_run(reopen_run.run_id)).id;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.reopen_run(uuid) IS
    'Makes a failed run pending again, with its failed steps; a pending one stays as it is.';


CREATE OR REPLACE FUNCTION pgflow_prefect.repair_run(run_id uuid) RETURNS uuid
LANGUAGE plpgsql VOLATILE
AS $$
BEGIN
    PERFORM pgflow_prefect.refuse_mirrored(repair_run.run_id, 'repaired');
    RETURN (pgflow.repair_run(repair_run.run_id)).id;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.repair_run(uuid) IS
    'Starts ready steps that were not started, and ends the run if all its steps are done.';


CREATE OR REPLACE FUNCTION pgflow_prefect.cancel_run(run_id uuid, reason text) RETURNS uuid
LANGUAGE plpgsql VOLATILE
AS $$
BEGIN
    PERFORM pgflow_prefect.refuse_mirrored(cancel_run.run_id, 'cancelled');
    RETURN (pgflow.cancel_run(cancel_run.run_id, cancel_run.reason)).id;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.cancel_run(uuid, text) IS
    'Ends a run and its pending steps as cancelled, with this reason; a run that has ended stays as it is.';


CREATE OR REPLACE FUNCTION pgflow_prefect.move_children(at_most int) RETURNS int
LANGUAGE plpgsql VOLATILE
AS $$
BEGIN
    RETURN pgflow.move_children(at_most);
END
$$;

COMMENT ON FUNCTION pgflow_prefect.move_children(int) IS
    'Cancels children that their parents have left, and reopens those that they wait for again, at most so many; returns how '
    'many.';


CREATE OR REPLACE FUNCTION pgflow_prefect.skip_step(run_id uuid, step_slug text, note text, cascade boolean)
RETURNS TABLE (status text, skip_reason text, skip_message text)
LANGUAGE plpgsql VOLATILE
AS $$
DECLARE
    state pgflow.step_states;
BEGIN
    PERFORM pgflow_prefect.refuse_mirrored(skip_step.run_id, 'changed by a skipped step');
    state := pgflow.skip_step(skip_step.run_id, skip_step.step_slug, skip_step.note, skip_step."cascade");
    status := state.status;
    skip_reason := state.skip_reason;
    skip_message := pgflow_prefect.describe_skip(state);
    RETURN NEXT;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.skip_step(uuid, text, text, boolean) IS
    'Skips a step by hand, pending or not started yet, and returns how it stands: a step that has ended stays as it is.';


DROP FUNCTION IF EXISTS pgflow_prefect.fail_run(uuid, text); -- before, a former owner could fail a run

CREATE OR REPLACE FUNCTION pgflow_prefect.fail_run(run_id uuid, epoch int, held_by text, reason text)
RETURNS boolean
LANGUAGE plpgsql VOLATILE
AS $$
BEGIN
    IF pgflow.is_under_policies() OR pgflow_prefect.is_under_policies() THEN
        PERFORM pgflow.refuse_policies('pgflow', 'pgflow_prefect');
    END IF;
    -- The run before its owner, as everywhere. Not by lock_run: a run that can't begin ends without beginning.
    PERFORM FROM pgflow.runs r WHERE r.id OPERATOR(pg_catalog.=) fail_run.run_id FOR NO KEY UPDATE;
    -- A reservation that ran out keeps its epoch: another process may have the run in the same one.
    IF NOT EXISTS (SELECT FROM pgflow.runs r
                   JOIN pgflow_prefect.owners o ON o.run_id OPERATOR(pg_catalog.=) r.id
                   WHERE r.id OPERATOR(pg_catalog.=) fail_run.run_id
                     AND r.epoch OPERATOR(pg_catalog.=) fail_run.epoch
                     AND o.epoch OPERATOR(pg_catalog.=) fail_run.epoch
                     AND o.held_by OPERATOR(pg_catalog.=) fail_run.held_by) THEN
        RETURN false;
    END IF;
    PERFORM pgflow.fail_run(fail_run.run_id, fail_run.reason);
    RETURN true;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.fail_run(uuid, int, text, text) IS
    'Fails a run that this process holds and can''t go on with, and its pending steps; Prefect''s Retry may reopen it. '
    'False where another process has taken the run: it stays as it is, and so does one that has ended.';


CREATE OR REPLACE FUNCTION pgflow_prefect.complete_pending_step(
    run_id uuid, step_slug text, task_index int, step_result jsonb, epoch int, attempt int, task_run_id uuid,
    outcome jsonb DEFAULT NULL
) RETURNS TABLE (status text, ended_as text, error_message text, accepted boolean, skip_reason text, skip_message text)
LANGUAGE plpgsql VOLATILE
AS $$
#variable_conflict use_column
DECLARE
    former pgflow.step_states;
    done pgflow.step_states;
    cached pg_catalog.jsonb := CASE WHEN complete_pending_step.outcome OPERATOR(pg_catalog.?) 'cache_key'
                                    THEN complete_pending_step.outcome END;
BEGIN
    -- start_step locks the run and returns the state under that lock, where no other report can end the step any more.
    former := pgflow.start_step(complete_pending_step.run_id, complete_pending_step.step_slug);
    done := pgflow_prefect.complete_step(complete_pending_step.run_id, complete_pending_step.step_slug,
                                         complete_pending_step.task_index, complete_pending_step.step_result,
                                         complete_pending_step.epoch, complete_pending_step.attempt,
                                         complete_pending_step.task_run_id,
                                         -- What pgflow_prefect.skip or branch has set in this transaction. Such a
                                         -- result is not cached.
                                         coalesce(CASE WHEN cached IS NULL THEN complete_pending_step.outcome END,
                                                  nullif(pg_catalog.current_setting('pgflow_prefect.outcome', true),
                                                         '')::pg_catalog.jsonb, cached));
    status := done.status;
    ended_as := done.ended_as;
    error_message := done.error_message;
    accepted := former.status OPERATOR(pg_catalog.=) 'pending' AND done.status OPERATOR(pg_catalog.=) 'completed';
    skip_reason := done.skip_reason;
    skip_message := pgflow_prefect.describe_skip(done);
    RETURN NEXT;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.complete_pending_step(uuid, text, int, jsonb, int, int, uuid, jsonb) IS
    'complete_step, with the outcome that is given or that the handler has set; and whether it was this call that ended the '
    'step.';


------------------------------------------------------------------------------------------------------------
-- Consumers of queues, which report for the owner of a run, whichever that is
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow_prefect.find_handover(run_id uuid, step_slug text, task_index int, attempt int)
RETURNS TABLE (awaited boolean, workflow_slug text, handler text)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    IF pgflow.is_under_policies() OR pgflow_prefect.is_under_policies() THEN
        PERFORM pgflow.refuse_policies('pgflow', 'pgflow_prefect');
    END IF;
    RETURN QUERY
        SELECT r.status = 'pending' AND s.status = 'pending' AND s.attempts = find_handover.attempt
               AND s.started_at IS NOT NULL, r.workflow_slug, t.handler
        FROM pgflow.step_states s
        JOIN pgflow.runs r ON r.id = s.run_id
        LEFT JOIN pgflow_prefect.task_runs t
               ON t.run_id = s.run_id AND t.step_slug = s.step_slug AND t.task_index = find_handover.task_index
              AND t.attempt = find_handover.attempt
        WHERE s.run_id = find_handover.run_id AND s.step_slug = find_handover.step_slug;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.find_handover(uuid, text, int, int) IS
    'Whether a step still waits for the report of this attempt, and the handler that the attempt was claimed for. '
    'No row: the run is gone.';


CREATE OR REPLACE FUNCTION pgflow_prefect.report_completion(
    run_id uuid, step_slug text, task_index int, step_result jsonb, attempt int, outcome jsonb DEFAULT NULL
) RETURNS text
LANGUAGE plpgsql VOLATILE
AS $$
BEGIN
    IF (task_index OPERATOR(pg_catalog.=) 0) IS NOT TRUE THEN
        PERFORM pgflow_prefect.refuse_task(step_slug, task_index);
    END IF;
    RETURN (pgflow_prefect.report_outcome(report_completion.run_id, report_completion.step_slug,
                                          report_completion.step_result, NULL, report_completion.attempt,
                                          report_completion.outcome)).status;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.report_completion(uuid, text, int, jsonb, int, jsonb) IS
    'Stores the result of an attempt, or another outcome of it, whichever owner the run has, and returns the step''s status.';


CREATE OR REPLACE FUNCTION pgflow_prefect.report_failure(
    run_id uuid, step_slug text, task_index int, error_message text, attempt int
) RETURNS text
LANGUAGE plpgsql VOLATILE
AS $$
BEGIN
    IF (task_index OPERATOR(pg_catalog.=) 0) IS NOT TRUE THEN
        PERFORM pgflow_prefect.refuse_task(step_slug, task_index);
    END IF;
    RETURN (pgflow.fail_step(report_failure.run_id, report_failure.step_slug, report_failure.error_message,
                             NULL, report_failure.attempt)).status;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.report_failure(uuid, text, int, text, int) IS
    'Fails a step and its run, whichever owner the run has, and returns the step''s status.';


------------------------------------------------------------------------------------------------------------
-- Claims and reports of several runs in one statement. No SET clause: triggers of users run inside.
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow_prefect.lock_ancestors(held jsonb, children uuid[]) RETURNS jsonb
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
DECLARE
    child uuid;
    above uuid;
BEGIN
    FOREACH child IN ARRAY children LOOP
        SELECT r.parent_run_id INTO above FROM pgflow.runs r WHERE r.id = child;
        WHILE above IS NOT NULL AND NOT coalesce(held ? above::text, false) LOOP
            PERFORM FROM pgflow.runs r WHERE r.id = above FOR NO KEY UPDATE SKIP LOCKED;
            IF NOT FOUND THEN
                held := CASE WHEN EXISTS (SELECT FROM pgflow.runs r WHERE r.id = above) THEN held - child::text ELSE held END;
                EXIT;
            END IF;
            SELECT r.parent_run_id INTO above FROM pgflow.runs r WHERE r.id = above;
        END LOOP;
    END LOOP;
    RETURN coalesce(held, '{}');
END
$$;

COMMENT ON FUNCTION pgflow_prefect.lock_ancestors(jsonb, uuid[]) IS
    'Locks the runs above these children, because the end of a child ends its step; leaves out those above which another '
    'transaction holds one. So a transaction that holds several runs waits for none. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.lock_runs(run_ids uuid[]) RETURNS jsonb
LANGUAGE plpgsql VOLATILE
AS $$
DECLARE
    held pg_catalog.jsonb;
    children pg_catalog.uuid[];
BEGIN
    IF pgflow.is_under_policies() THEN
        PERFORM pgflow.refuse_policies();
    END IF;
    IF pg_catalog.cardinality(run_ids) OPERATOR(pg_catalog.=) 1 THEN
        PERFORM FROM pgflow.runs r WHERE r.id OPERATOR(pg_catalog.=) run_ids[1] FOR NO KEY UPDATE;
        RETURN NULL;
    END IF;
    SELECT pg_catalog.jsonb_object_agg(l.id, true), pg_catalog.array_agg(l.id) FILTER (WHERE l.parent_run_id IS NOT NULL)
    INTO held, children
    FROM (SELECT r.id, r.parent_run_id FROM pgflow.runs r WHERE r.id OPERATOR(pg_catalog.=) ANY (run_ids)
          ORDER BY r.id FOR NO KEY UPDATE SKIP LOCKED) l;
    IF children IS NOT NULL THEN
        RETURN pgflow_prefect.lock_ancestors(held, children);
    END IF;
    RETURN coalesce(held, '{}');
END
$$;

COMMENT ON FUNCTION pgflow_prefect.lock_runs(uuid[]) IS
    'Locks the rows of runs, by id. Waits for one run alone, and returns NULL; of several it locks those that no other '
    'transaction holds, with those above them, and returns an object that has their ids. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.find_refusal(
    run_id uuid, step_slug text, task_index int, epoch int, task_run_id uuid, bound text, has_function boolean
) RETURNS text
LANGUAGE plpgsql VOLATILE
AS $$
DECLARE
    reason pg_catalog.text;
    broken_constraint pg_catalog.text;
BEGIN
    PERFORM FROM pgflow_prefect.claim_step(
        run_id, step_slug, task_index, epoch, task_run_id, '{}', false, bound, has_function, NULL);
    RETURN NULL;
EXCEPTION WHEN object_not_in_prerequisite_state THEN
    GET STACKED DIAGNOSTICS reason = MESSAGE_TEXT, broken_constraint = CONSTRAINT_NAME;
    IF broken_constraint OPERATOR(pg_catalog.=) ANY ('{runs_status,step_states_status}'::pg_catalog.text[]) THEN
        RETURN reason;
    END IF;
    RAISE;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.find_refusal(uuid, text, int, int, uuid, text, boolean) IS
    'Why a task of a run that has ended can''t be claimed; NULL where a claim returns how it ended. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.perform_tasks(elements jsonb)
RETURNS TABLE (outcome text, status text, ended_as text, error_message text, attempt int, payload jsonb,
               upstream_results jsonb, kind text, target text, options jsonb, waits boolean, waited double precision,
               began_at timestamptz, ended_at timestamptz, note text, skip_reason text, logical_date timestamptz,
               interval_start timestamptz, interval_end timestamptz)
LANGUAGE plpgsql VOLATILE
AS $$
#variable_conflict use_column
DECLARE
    element pg_catalog.record;
    run pg_catalog.record;
    state pgflow.step_states;
    held pg_catalog.jsonb;
BEGIN
    IF pgflow.is_under_policies() OR pgflow_prefect.is_under_policies() THEN -- a hidden run would look like one that is gone
        PERFORM pgflow.refuse_policies('pgflow', 'pgflow_prefect');
    END IF;
    held := pgflow_prefect.lock_runs((
        SELECT pg_catalog.array_agg(DISTINCT e.run_id)
        FROM pg_catalog.jsonb_to_recordset(elements) AS e(run_id pg_catalog.uuid)));
    FOR element IN
        SELECT * FROM pg_catalog.jsonb_to_recordset(elements) AS e(
            "do" pg_catalog.text, run_id pg_catalog.uuid, epoch int, step_slug pg_catalog.text, task_index int,
            task_run_id pg_catalog.uuid, attempt int, result pg_catalog.jsonb, outcome pg_catalog.jsonb,
            error_message pg_catalog.text,
            state_name pg_catalog.text, upstream pg_catalog.text[], with_payload boolean, bound pg_catalog.text,
            has_function boolean, handler pg_catalog.text)
    LOOP
        outcome := NULL;
        status := NULL;
        ended_as := NULL;
        error_message := NULL;
        attempt := NULL;
        payload := NULL;
        upstream_results := NULL;
        kind := NULL;
        target := NULL;
        options := NULL;
        waits := NULL;
        waited := NULL;
        began_at := NULL;
        ended_at := NULL;
        note := NULL;
        skip_reason := NULL;
        logical_date := NULL;
        interval_start := NULL;
        interval_end := NULL;
        SELECT r.status, r.epoch INTO run FROM pgflow.runs r WHERE r.id OPERATOR(pg_catalog.=) element.run_id;
        IF NOT FOUND THEN
            outcome := 'gone';
            error_message := pg_catalog.format('unknown run %s', coalesce(element.run_id::pg_catalog.text, 'NULL'));
            RETURN NEXT;
            CONTINUE;
        ELSIF held IS NOT NULL AND NOT held OPERATOR(pg_catalog.?) element.run_id::pg_catalog.text THEN
            outcome := 'locked';
            RETURN NEXT;
            CONTINUE;
        END IF;
        outcome := CASE WHEN run.epoch OPERATOR(pg_catalog.>) element.epoch THEN 'superseded' ELSE 'done' END;
        IF element."do" OPERATOR(pg_catalog.=) 'complete' THEN
            state := pgflow_prefect.complete_step(
                element.run_id, element.step_slug, element.task_index, coalesce(element.result, 'null'),
                element.epoch, element.attempt, element.task_run_id, element.outcome);
        ELSIF element."do" OPERATOR(pg_catalog.=) 'fail' THEN
            state := pgflow_prefect.fail_step(
                element.run_id, element.step_slug, element.task_index, element.error_message, element.epoch,
                element.attempt, element.task_run_id, element.state_name);
        ELSIF element."do" OPERATOR(pg_catalog.=) 'claim' THEN
            IF outcome OPERATOR(pg_catalog.=) 'superseded' THEN
                PERFORM pgflow_prefect.is_stale(element.run_id, element.epoch); -- counts it
            ELSIF run.status OPERATOR(pg_catalog.<>) 'pending' THEN
                error_message := pgflow_prefect.find_refusal(
                    element.run_id, element.step_slug, element.task_index, element.epoch, element.task_run_id,
                    element.bound, element.has_function);
                IF error_message IS NOT NULL THEN
                    outcome := 'ended';
                END IF;
            END IF;
            IF outcome OPERATOR(pg_catalog.=) 'done' THEN
                SELECT c.status, c.attempt, c.payload, c.upstream_results, c.kind, c.target, c.options, c.waits,
                       c.waited, c.began_at, c.ended_at, c.note, c.skip_reason, c.logical_date, c.interval_start,
                       c.interval_end
                INTO status, attempt, payload, upstream_results, kind, target, options, waits, waited, began_at,
                     ended_at, note, skip_reason, logical_date, interval_start, interval_end
                FROM pgflow_prefect.claim_step(
                    element.run_id, element.step_slug, element.task_index, element.epoch, element.task_run_id,
                    element.upstream, element.with_payload, element.bound, element.has_function,
                    element.handler) c;
            END IF;
        ELSE
            RAISE EXCEPTION 'an element has to complete, fail or claim a task, and this one says %',
                            coalesce(element."do", 'nothing')
                USING ERRCODE = 'invalid_parameter_value';
        END IF;
        IF element."do" OPERATOR(pg_catalog.<>) 'claim' THEN
            status := state.status;
            ended_as := state.ended_as;
            error_message := state.error_message;
            IF state.skip_reason IS NOT NULL THEN
                skip_reason := state.skip_reason;
                note := pgflow_prefect.describe_skip(state);
            END IF;
        END IF;
        RETURN NEXT;
    END LOOP;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.perform_tasks(jsonb) IS
    'Completes, fails and claims tasks of one or several runs in one transaction: a row for each element, in their order. '
    'outcome: done; superseded, ended, gone: that run is not the caller''s any more; locked: of several runs, another '
    'transaction holds this one. Nothing was done then, and the element is tried again in a batch of its run alone. Any '
    'other error undoes all.';


------------------------------------------------------------------------------------------------------------
-- Maps: the items of a step that is executed once for each item of an array. No SET clauses where a step may end: triggers
-- of users run inside.
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow_prefect.find_next_due(run_id uuid, step_slug text) RETURNS double precision
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off
SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off
AS $$
BEGIN
    RETURN (SELECT GREATEST(0, extract(epoch FROM i.due_at - clock_timestamp())) FROM pgflow.step_items i
            WHERE i.run_id = find_next_due.run_id AND i.step_slug = find_next_due.step_slug
              AND i.due_at > '-infinity' AND i.due_at < 'infinity'
            ORDER BY i.due_at LIMIT 1);
END
$$;

COMMENT ON FUNCTION pgflow_prefect.find_next_due(uuid, text) IS
    'In how many seconds the next item of a map can be claimed again; NULL where none has such a time. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.work_items(
    run_id uuid, step_slug text, epoch int, reports jsonb, wanted int, held int[]
) RETURNS TABLE (status text, ended_as text, error_message text, skip_reason text, skip_message text, run_status text,
                 total int, remaining int, failed int, next_due double precision, item_index int, attempt int, item jsonb)
LANGUAGE plpgsql VOLATILE
AS $$
#variable_conflict use_column
DECLARE
    run pgflow.runs;
    map pgflow.step_maps;
    state pgflow.step_states;
    said pg_catalog.record;
    noted pg_catalog.record;
    claimed pg_catalog.record;
    claims int := 0;
BEGIN
    IF pgflow_prefect.is_under_policies() THEN
        PERFORM pgflow.refuse_policies('pgflow', 'pgflow_prefect');
    END IF;
    run := pgflow.lock_run(work_items.run_id);
    IF run.epoch OPERATOR(pg_catalog.>) work_items.epoch AND pgflow_prefect.is_stale(run.id, work_items.epoch) THEN
        RETURN NEXT; -- without a status, as in claim_step
        RETURN;
    END IF;
    map := pgflow.lock_map(run.id, work_items.step_slug, work_items.epoch, 'claimed');
    IF map.run_id IS NOT NULL AND work_items.held IS NOT NULL THEN
        PERFORM pgflow.release_items(map, work_items.epoch, work_items.held);
    END IF;
    IF map.run_id IS NOT NULL AND pg_catalog.jsonb_array_length(reports) OPERATOR(pg_catalog.>) 0 THEN
        SELECT pg_catalog.array_agg(e.item_index) AS item_indexes, pg_catalog.array_agg(e.attempt) AS attempts,
               pg_catalog.array_agg(e."do") AS doings, pg_catalog.array_agg(coalesce(e.result, 'null')) AS results,
               pg_catalog.array_agg(e.message) AS messages,
               pg_catalog.array_agg(pg_catalog.make_interval(secs => e.pause)) AS pauses
        INTO said
        FROM pg_catalog.jsonb_to_recordset(reports) AS e(
            item_index int, attempt int, "do" pg_catalog.text, result pg_catalog.jsonb, message pg_catalog.text,
            pause double precision);
        SELECT * INTO noted FROM pgflow.note_items(
            map, said.item_indexes, said.attempts, said.doings, said.results, said.messages, said.pauses);
        PERFORM pgflow.count_items(map, noted.ended, noted.failed);
    END IF;
    FOR claimed IN
        SELECT c.item_index, c.attempt, c.item
        FROM pgflow.claim_items(run.id, work_items.step_slug, wanted, work_items.epoch) c
    LOOP
        claims := claims OPERATOR(pg_catalog.+) 1;
        item_index := claimed.item_index;
        attempt := claimed.attempt;
        item := claimed.item;
        RETURN NEXT;
    END LOOP;
    SELECT * INTO state FROM pgflow.step_states s
    WHERE s.run_id OPERATOR(pg_catalog.=) run.id AND s.step_slug OPERATOR(pg_catalog.=) work_items.step_slug;
    SELECT m.total, m.remaining, m.failed INTO total, remaining, failed FROM pgflow.step_maps m
    WHERE m.run_id OPERATOR(pg_catalog.=) run.id AND m.step_slug OPERATOR(pg_catalog.=) work_items.step_slug;
    SELECT r.status INTO run_status FROM pgflow.runs r WHERE r.id OPERATOR(pg_catalog.=) run.id;
    IF claims OPERATOR(pg_catalog.<) wanted AND state.status OPERATOR(pg_catalog.=) 'pending' THEN
        next_due := pgflow_prefect.find_next_due(run.id, work_items.step_slug);
    END IF;
    status := state.status;
    ended_as := state.ended_as;
    error_message := state.error_message;
    skip_reason := state.skip_reason;
    skip_message := pgflow_prefect.describe_skip(state);
    item_index := NULL;
    attempt := NULL;
    item := NULL;
    RETURN NEXT;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.work_items(uuid, text, int, jsonb, int, int[]) IS
    'For the owner of a run: reports on items of a map, and claims others, in one statement. Reports: [{"do": complete, '
    'skip, fail, retry or defer, "item_index", "attempt", "result", "message", "pause" in seconds}]. A row for each claimed '
    'item, and at last one that says how the map stands. held: items that this owner has under way, where the answer to a '
    'claim was lost: others that it has claimed can be claimed again. One row of NULL for a former owner.';


CREATE OR REPLACE FUNCTION pgflow_prefect.complete_pending_items(
    run_id uuid, step_slug text, item_indexes int[], item_results jsonb, epoch int, attempts int[],
    outcome jsonb DEFAULT NULL
) RETURNS TABLE (status text, ended_as text, error_message text, accepted boolean, skip_reason text, skip_message text)
LANGUAGE plpgsql VOLATILE
AS $$
#variable_conflict use_column
DECLARE
    state pgflow.step_states;
    counted int;
BEGIN
    outcome := coalesce(outcome, nullif(pg_catalog.current_setting( -- what pgflow_prefect.skip has set
        'pgflow_prefect.outcome', true), '')::pg_catalog.jsonb);
    IF outcome IS NULL THEN
        counted := pgflow.complete_items(run_id, step_slug, item_indexes, item_results, epoch, attempts);
    ELSIF outcome OPERATOR(pg_catalog.?) 'skip' THEN
        counted := pgflow.skip_items(run_id, step_slug, item_indexes,
                                     pg_catalog.array_fill(outcome OPERATOR(pg_catalog.->>) 'note',
                                                           ARRAY[pg_catalog.cardinality(item_indexes)]), epoch, attempts);
    ELSE
        RAISE EXCEPTION 'an item of step "%" can''t take branches: only a whole step does', step_slug
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    SELECT * INTO state FROM pgflow.step_states s
    WHERE s.run_id OPERATOR(pg_catalog.=) complete_pending_items.run_id
      AND s.step_slug OPERATOR(pg_catalog.=) complete_pending_items.step_slug;
    status := state.status;
    ended_as := state.ended_as;
    error_message := state.error_message;
    accepted := counted OPERATOR(pg_catalog.=) pg_catalog.cardinality(item_indexes);
    skip_reason := state.skip_reason;
    skip_message := pgflow_prefect.describe_skip(state);
    RETURN NEXT;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.complete_pending_items(uuid, text, int[], jsonb, int, int[], jsonb) IS
    'pgflow.complete_items, or skip_items where the handler has said so in this transaction; how the map stands then, and '
    'whether all of these reports were accepted.';


CREATE OR REPLACE FUNCTION pgflow_prefect.choose_maps(workflow_slug text, only_step text, wanted int)
RETURNS TABLE (run_id uuid, step_slug text)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off
SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
#variable_conflict use_column
DECLARE
    moment CONSTANT timestamptz := clock_timestamp(); -- a volatile call is no condition of an index
BEGIN
    RETURN QUERY
        SELECT e.run_id, e.step_slug FROM pgflow_prefect.external_steps e
        JOIN pgflow.runs r ON r.id = e.run_id
        CROSS JOIN LATERAL (
            SELECT FROM pgflow.step_maps m
            WHERE m.run_id = e.run_id AND m.step_slug = e.step_slug
              AND (m.next_item < m.total
                   OR EXISTS (SELECT FROM pgflow.step_items i
                              WHERE i.run_id = m.run_id AND i.step_slug = m.step_slug AND i.due_at <= moment
                              OFFSET 0)) OFFSET 0) m
        WHERE e.workflow_slug = choose_maps.workflow_slug AND (only_step IS NULL OR e.step_slug = only_step)
        ORDER BY e.run_created_at, e.created_at -- as in choose_external_steps
        LIMIT wanted
        FOR NO KEY UPDATE OF r SKIP LOCKED;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.choose_maps(text, text, int) IS
    'Locks the runs of external maps that have items to claim, and returns the maps. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.take_items(
    workflow_slug text, only_step text DEFAULT NULL, wanted int DEFAULT 1, lease interval DEFAULT NULL
) RETURNS TABLE (run_id uuid, step_slug text, item_index int, attempt int, item jsonb)
LANGUAGE plpgsql VOLATILE
AS $$
#variable_conflict use_column
DECLARE
    candidate pg_catalog.record;
    claimed pg_catalog.record;
    open_places int := wanted;
BEGIN
    IF wanted IS NULL OR wanted OPERATOR(pg_catalog.<) 0 THEN
        RAISE EXCEPTION 'can''t take % items', coalesce(wanted::pg_catalog.text, 'NULL')
            USING ERRCODE = 'invalid_parameter_value', HINT = 'Say how many at most: a number of 0 or more.';
    END IF;
    IF pgflow_prefect.is_under_policies() THEN
        PERFORM pgflow.refuse_policies('pgflow', 'pgflow_prefect');
    END IF;
    FOR candidate IN SELECT * FROM pgflow_prefect.choose_maps(workflow_slug, only_step, wanted) LOOP
        EXIT WHEN open_places OPERATOR(pg_catalog.<=) 0;
        FOR claimed IN
            SELECT c.item_index, c.attempt, c.item
            FROM pgflow.claim_items(candidate.run_id, candidate.step_slug, open_places, NULL, lease) c
        LOOP
            run_id := candidate.run_id;
            step_slug := candidate.step_slug;
            item_index := claimed.item_index;
            attempt := claimed.attempt;
            item := claimed.item;
            open_places := open_places OPERATOR(pg_catalog.-) 1;
            RETURN NEXT;
        END LOOP;
    END LOOP;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.take_items(text, text, int, interval) IS
    'For workers outside Prefect: claims items of external maps of a workflow, or of one of its steps, the oldest first, at '
    'most so many. pgflow.complete_items and fail_items report them. With a lease, they can be taken again once it is over.';


CREATE OR REPLACE FUNCTION pgflow_prefect.find_item_handover(
    run_id uuid, step_slug text, item_index int, attempt int
) RETURNS TABLE (awaited boolean, workflow_slug text, handler text)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
DECLARE
    item record;
    step_status text;
BEGIN
    IF pgflow.is_under_policies() OR pgflow_prefect.is_under_policies() THEN
        PERFORM pgflow.refuse_policies('pgflow', 'pgflow_prefect');
    END IF;
    SELECT i.status, i.attempts, i.started_at INTO item FROM pgflow.step_items i
    WHERE i.run_id = find_item_handover.run_id AND i.step_slug = find_item_handover.step_slug
      AND i.item_index = find_item_handover.item_index;
    SELECT s.status INTO step_status FROM pgflow.step_states s
    WHERE s.run_id = find_item_handover.run_id AND s.step_slug = find_item_handover.step_slug;
    SELECT t.handler INTO handler FROM pgflow_prefect.task_runs t
    WHERE t.run_id = find_item_handover.run_id AND t.step_slug = find_item_handover.step_slug AND t.task_index = 0;
    RETURN QUERY
        SELECT coalesce(r.status = 'pending' AND step_status = 'pending' AND item.status = 'pending'
                        AND item.attempts = find_item_handover.attempt AND item.started_at IS NOT NULL, false),
               r.workflow_slug, find_item_handover.handler
        FROM pgflow.runs r WHERE r.id = find_item_handover.run_id;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.find_item_handover(uuid, text, int, int) IS
    'find_handover for an item of a map.';


CREATE OR REPLACE FUNCTION pgflow_prefect.read_item_input(run_id uuid, step_slug text, item_index int)
RETURNS TABLE (payload jsonb, upstream_results jsonb, logical_date timestamptz, interval_start timestamptz,
               interval_end timestamptz)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
DECLARE
    run record;
    map record;
    others text[];
BEGIN
    SELECT r.id, r.definition_id, r.payload, r.logical_date, lower(r.data_interval) AS interval_start,
           upper(r.data_interval) AS interval_end
    INTO run FROM pgflow.runs r WHERE r.id = read_item_input.run_id;
    SELECT d.map_over, d.map_path INTO map FROM pgflow.definition_steps d
    WHERE d.definition_id = run.definition_id AND d.slug = read_item_input.step_slug;
    others := ARRAY(SELECT d.from_step_slug FROM pgflow.definition_deps d
                    WHERE d.definition_id = run.definition_id AND d.to_step_slug = read_item_input.step_slug
                      AND d.from_step_slug <> coalesce(map.map_over, ''));
    RETURN QUERY
        SELECT CASE WHEN map.map_over IS NOT NULL THEN run.payload
                    WHEN cardinality(map.map_path) > 0 THEN run.payload #- map.map_path ELSE 'null' END,
               (SELECT coalesce(jsonb_object_agg(CASE e.key WHEN 'item' THEN 'item_' ELSE e.key END, e.value), '{}')
                FROM pgflow_prefect.read_input(run.id, read_item_input.step_slug, 0, others) o
                CROSS JOIN LATERAL jsonb_each(o.upstream_results) e) || jsonb_build_object('item', i.item),
               run.logical_date, run.interval_start, run.interval_end
        FROM pgflow.step_items i
        WHERE i.run_id = run.id AND i.step_slug = read_item_input.step_slug
          AND i.item_index = read_item_input.item_index;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.read_item_input(uuid, text, int) IS
    'read_input for an item of a map, without what the map maps over.';


CREATE OR REPLACE FUNCTION pgflow_prefect.report_item(
    run_id uuid, step_slug text, item_index int, attempt int, item_result jsonb, outcome jsonb, error_message text
) RETURNS text
LANGUAGE plpgsql VOLATILE
AS $$
BEGIN
    IF error_message IS NOT NULL THEN
        PERFORM pgflow.fail_items(run_id, step_slug, ARRAY[item_index], ARRAY[error_message], NULL, NULL, ARRAY[attempt]);
    ELSE
        PERFORM pgflow_prefect.complete_pending_items(
            run_id, step_slug, ARRAY[item_index], pg_catalog.jsonb_build_array(item_result), NULL, ARRAY[attempt], outcome);
    END IF;
    RETURN (SELECT s.status FROM pgflow.step_states s
            WHERE s.run_id OPERATOR(pg_catalog.=) report_item.run_id
              AND s.step_slug OPERATOR(pg_catalog.=) report_item.step_slug);
END
$$;

COMMENT ON FUNCTION pgflow_prefect.report_item(uuid, text, int, int, jsonb, jsonb, text) IS
    'Stores the result of an attempt of an item, whichever owner the run has, or leaves the item out, or (error_message) '
    'fails it; returns the status of its map.';


CREATE OR REPLACE FUNCTION pgflow_prefect.list_returned_items(run_id uuid, step_slug text, item_indexes int[])
RETURNS TABLE (item_index int)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT i.item_index FROM pgflow.step_items i
        WHERE i.run_id = list_returned_items.run_id AND i.step_slug = list_returned_items.step_slug
          AND i.item_index = ANY (list_returned_items.item_indexes)
          AND i.error_message IS NOT NULL; -- of a retry; a deferred item has none
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_returned_items(uuid, text, int[]) IS
    'Which of these items of a map were given back, to be executed again, and have not been deferred since.';


CREATE OR REPLACE FUNCTION pgflow_prefect.list_failed_items(run_id uuid, step_slug text, at_most int)
RETURNS TABLE (item_index int, attempts int, error_message text)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT i.item_index, i.attempts, i.error_message FROM pgflow.step_items i
        WHERE i.run_id = list_failed_items.run_id AND i.step_slug = list_failed_items.step_slug AND i.status = 'failed'
        ORDER BY i.item_index LIMIT list_failed_items.at_most;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_failed_items(uuid, text, int) IS 'The first failed items of a map.';


------------------------------------------------------------------------------------------------------------
-- Runs that are compared with Prefect
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow_prefect.list_unsettled(everything boolean, after uuid, at_most int)
RETURNS SETOF uuid
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    RETURN QUERY
        SELECT o.run_id
        FROM pgflow_prefect.owners o
        WHERE (list_unsettled.everything OR NOT o.settled)
          AND NOT pgflow_prefect.is_unshown(o.flow_run_id)
          AND (list_unsettled.after IS NULL OR o.run_id > list_unsettled.after)
        ORDER BY o.run_id
        LIMIT list_unsettled.at_most;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_unsettled(boolean, uuid, int) IS
    'Runs that were taken and whose states in Prefect are not known to agree, by id; everything: all that were '
    'taken. Without runs that Prefect was not told of.';


CREATE OR REPLACE FUNCTION pgflow_prefect.read_unsettled(run_ids uuid[], lease double precision)
RETURNS TABLE (id uuid, workflow_slug text, status text, ended_as text, is_given_up boolean, error_message text,
               finished_at timestamptz, epoch int,
               taken_at timestamptz, now timestamptz, flow_run_id uuid, held text, flow_run_ids uuid[])
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT r.id, r.workflow_slug, r.status, r.ended_as::text, coalesce(o.given_up_in = r.epoch, false),
               r.error_message, r.finished_at, o.epoch, o.taken_at, clock_timestamp(),
               CASE WHEN o.epoch = r.epoch THEN o.flow_run_id END,
               pgflow_prefect.how_held(o, r.epoch, read_unsettled.lease),
               ARRAY(SELECT DISTINCT f.flow_run_id FROM pgflow_prefect.flow_runs f WHERE f.run_id = r.id)
        FROM pgflow_prefect.owners o
        JOIN pgflow.runs r ON r.id = o.run_id
        WHERE o.run_id = ANY (read_unsettled.run_ids)
        ORDER BY r.id;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.read_unsettled(uuid[], double precision) IS
    'Those of these runs that were taken, with all their flow runs.';


CREATE OR REPLACE FUNCTION pgflow_prefect.list_unsettled_steps(run_ids uuid[])
RETURNS TABLE (run_id uuid, step_slug text, task_index int, status text, ended_as text, error_message text,
               task_run_id uuid)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT t.run_id, t.step_slug, t.task_index, s.status, s.ended_as::text, s.error_message, t.task_run_id
        FROM pgflow_prefect.task_runs t
        JOIN pgflow.step_states s ON s.run_id = t.run_id AND s.step_slug = t.step_slug
        WHERE t.run_id = ANY (list_unsettled_steps.run_ids)
        ORDER BY s.created_at, t.step_slug, t.task_index;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_unsettled_steps(uuid[]) IS
    'The steps of these runs that a task run has claimed, without their results, which may be large.';


CREATE OR REPLACE FUNCTION pgflow_prefect.settle_runs(run_ids uuid[], epochs int[]) RETURNS SETOF uuid
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        UPDATE pgflow_prefect.owners o
        SET settled = true
        FROM unnest(settle_runs.run_ids, settle_runs.epochs) AS seen (run_id, epoch)
        JOIN pgflow.runs r ON r.id = seen.run_id AND r.status <> 'pending'
        WHERE o.run_id = seen.run_id AND o.epoch = seen.epoch AND NOT o.settled
        RETURNING o.run_id;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.settle_runs(uuid[], int[]) IS
    'Notes that Prefect shows the end of these runs, unless a process has taken them again since this epoch.';


CREATE OR REPLACE FUNCTION pgflow_prefect.find_known(run_ids uuid[], flow_run_ids uuid[])
RETURNS TABLE (known_runs uuid[], known_flow_runs uuid[])
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    RETURN QUERY
        SELECT ARRAY(SELECT r.id FROM pgflow.runs r WHERE r.id = ANY (find_known.run_ids)),
               ARRAY(SELECT f.flow_run_id FROM pgflow_prefect.flow_runs f
                     WHERE f.flow_run_id = ANY (find_known.flow_run_ids));
END
$$;

COMMENT ON FUNCTION pgflow_prefect.find_known(uuid[], uuid[]) IS
    'Which of these runs exist, and which of these flow runs have ever taken one.';


------------------------------------------------------------------------------------------------------------
-- Diagnosis
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow_prefect.list_beats() RETURNS uuid[]
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    RETURN coalesce((SELECT h.beats FROM pgflow_prefect.heartbeats h), '{}');
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_beats() IS 'The latest signs of life of services, the newest first.';


CREATE OR REPLACE FUNCTION pgflow_prefect.count_untaken_runs(seconds double precision, lease double precision)
RETURNS TABLE (workflow_slug text, runs bigint, older bigint)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT r.workflow_slug,
               count(*) FILTER (WHERE r.parent_run_id IS NOT NULL
                                      OR NOT pgflow_prefect.is_older(r.created_at, r.epoch, o, e)),
               count(*) FILTER (WHERE r.parent_run_id IS NULL
                                      AND pgflow_prefect.is_older(r.created_at, r.epoch, o, e))
        FROM pgflow.runs r
        LEFT JOIN pgflow_prefect.enabled_workflows e ON e.workflow_slug = r.workflow_slug
        LEFT JOIN pgflow_prefect.owners o ON o.run_id = r.id
        WHERE r.status = 'pending'
          AND coalesce(e.enabled, r.parent_run_id IS NOT NULL) -- a step of another run waits for it
          AND (r.created_at IS NULL
               OR r.created_at < clock_timestamp() - make_interval(secs => count_untaken_runs.seconds))
          AND coalesce(pgflow_prefect.how_held(o, r.epoch, count_untaken_runs.lease), 'released')
              IN ('released', 'expired')
          AND (o.run_id IS NULL
               OR o.taken_at < clock_timestamp() - make_interval(secs => count_untaken_runs.seconds))
          AND NOT EXISTS (SELECT FROM pgflow_prefect.set_aside_runs a WHERE a.run_id = r.id AND a.epoch = r.epoch)
        GROUP BY r.workflow_slug
        ORDER BY r.workflow_slug;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.count_untaken_runs(double precision, double precision) IS
    'Pending runs of enabled workflows, and children, that no process has taken for so many seconds; those begun before '
    'the enabling apart. Without those that are set aside.';


CREATE OR REPLACE FUNCTION pgflow_prefect.list_set_aside(lease double precision, at_most int)
RETURNS TABLE (run_id uuid, workflow_slug text, reason text, runs bigint)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT a.run_id, r.workflow_slug, a.reason, count(*) OVER ()
        FROM pgflow_prefect.set_aside_runs a
        JOIN pgflow.runs r ON r.id = a.run_id AND r.epoch = a.epoch AND r.status = 'pending'
        LEFT JOIN pgflow_prefect.owners o ON o.run_id = r.id
        WHERE coalesce(pgflow_prefect.how_held(o, r.epoch, list_set_aside.lease), 'released') IN ('released', 'expired')
        ORDER BY a.tries DESC, a.run_id
        LIMIT list_set_aside.at_most;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_set_aside(double precision, int) IS
    'Pending runs that could not be taken, those with the most tries first, and how many there are in all.';


CREATE OR REPLACE FUNCTION pgflow_prefect.count_prunable(
    older_than interval, grace interval, workflow_slugs text[], only_status text
) RETURNS TABLE (workflow_slug text, status text, runs bigint, kept bigint)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT among.slug, among.status, count(*) FILTER (WHERE among.goes), count(*) FILTER (WHERE NOT among.goes)
        FROM (
            SELECT w.slug, r.status,
                   (r.finished_at < clock_timestamp() - count_prunable.older_than - count_prunable.grace
                        OR pgflow_prefect.is_let_go(r.id))
                       AND (r.parent_run_id IS NULL
                            OR NOT EXISTS (SELECT FROM pgflow.runs p
                                           WHERE p.id = r.parent_run_id AND p.status = 'pending' OFFSET 0)) AS goes
            FROM pgflow.workflows w
            JOIN pgflow.runs r ON r.workflow_slug = w.slug AND r.status IN ('completed', 'failed')
                 AND r.status <> 'pending' AND r.finished_at < clock_timestamp() - count_prunable.older_than
                 AND NOT EXISTS (SELECT FROM pgflow_prefect.mirrored_runs m -- as in choose_prunable
                                 WHERE m.run_id = r.id AND m.mirrored_at >= clock_timestamp() - count_prunable.older_than
                                 OFFSET 0)
            WHERE (count_prunable.workflow_slugs IS NULL OR w.slug = ANY (count_prunable.workflow_slugs))
              AND (count_prunable.only_status IS NULL OR r.status = count_prunable.only_status)
        ) among
        GROUP BY among.slug, among.status
        ORDER BY among.slug, among.status;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.count_prunable(interval, interval, text[], text) IS
    'Runs that ended longer ago than that, by workflow and status; those that are left to a later time counted apart.';


------------------------------------------------------------------------------------------------------------
-- The version, at last: a database that has it has all scripts of it
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow_prefect.adapter_version() RETURNS int
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$ SELECT 10 $$;

COMMENT ON FUNCTION pgflow_prefect.adapter_version() IS 'Version of these scripts: a higher one upgrades a lower one.';


DO $rights$
BEGIN
    PERFORM pgflow.close_schema('pgflow_prefect');
END
$rights$;

COMMIT;
