-- pgflow_prefect: what the adapter between pgflow and Prefect keeps for itself.
--
-- Which flow run executes a run, and which task run a step. Needs pgflow.sql, changes nothing in it.
-- psql -d DATABASE -f pgflow_prefect.sql; one transaction, safe to run again.

BEGIN;

SET LOCAL lock_timeout = '10s';
SET LOCAL client_min_messages = warning;

DO $guard$
BEGIN
    IF to_regclass('pgflow.definitions') IS NULL THEN
        RAISE EXCEPTION 'the schema pgflow is missing or old' USING HINT = 'Run pgflow.sql first.';
    END IF;
    PERFORM pg_catalog.pg_advisory_xact_lock(7031902210563);
END
$guard$;

CREATE SCHEMA IF NOT EXISTS pgflow_prefect;

-- A run's owners, one a row: the flow run that took it, in the epoch that it got.
CREATE TABLE IF NOT EXISTS pgflow_prefect.flow_runs (
    run_id UUID NOT NULL REFERENCES pgflow.runs (id) ON DELETE CASCADE,
    epoch INT NOT NULL,
    flow_run_id UUID NOT NULL,
    taken_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (run_id, epoch)
);

-- A step's latest task run, and the state that Prefect shows it in.
CREATE TABLE IF NOT EXISTS pgflow_prefect.task_runs (
    run_id UUID NOT NULL REFERENCES pgflow.runs (id) ON DELETE CASCADE,
    step_slug TEXT NOT NULL,
    task_run_id UUID NOT NULL,
    state_name TEXT NOT NULL,
    message TEXT,                  -- of the latest attempt that failed and is tried again
    updated_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (run_id, step_slug)
);

DO $columns$
BEGIN
    IF to_regclass('pgflow_prefect.flow_runs_by_id') IS NULL THEN
        CREATE INDEX flow_runs_by_id ON pgflow_prefect.flow_runs (flow_run_id);
    END IF;
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_class
                   WHERE oid = 'pgflow_prefect.task_runs'::regclass AND 'fillfactor=70' = ANY (reloptions)) THEN
        ALTER TABLE pgflow_prefect.task_runs SET (fillfactor = 70); -- a state's change is an update in place
    END IF;
END
$columns$;

CREATE OR REPLACE FUNCTION pgflow_prefect.adapter_version() RETURNS int
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$ SELECT 1 $$;

COMMENT ON FUNCTION pgflow_prefect.adapter_version() IS 'Version of this script: a higher one upgrades a lower one.';


CREATE OR REPLACE FUNCTION pgflow_prefect.take_run(run_id uuid, flow_run_id uuid) RETURNS pgflow.runs
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
#variable_conflict use_column
DECLARE
    run pgflow.runs;
BEGIN
    INSERT INTO pgflow_prefect.flow_runs (run_id, epoch, flow_run_id)
    VALUES (take_run.run_id, pgflow.take_run(take_run.run_id), take_run.flow_run_id);
    SELECT * INTO run FROM pgflow.runs r WHERE r.id = take_run.run_id;
    RETURN run;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.take_run(uuid, uuid) IS
    'Makes a flow run the owner of a pending run, in a new epoch, and returns the run.';


-- The three below do what their namesakes in pgflow do, and note the task run in the same round trip.

CREATE OR REPLACE FUNCTION pgflow_prefect.claim_step(
    run_id uuid, step_slug text, epoch int, task_run_id uuid, upstream text[], with_payload boolean
) RETURNS TABLE (status text, attempt int, step_result jsonb, payload jsonb, upstream_results jsonb)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
#variable_conflict use_column
BEGIN
    SELECT c.* INTO status, attempt, step_result, payload, upstream_results
    FROM pgflow.claim_step(claim_step.run_id, claim_step.step_slug, claim_step.epoch,
                           claim_step.upstream, claim_step.with_payload) c;
    INSERT INTO pgflow_prefect.task_runs AS t (run_id, step_slug, task_run_id, state_name)
    VALUES (claim_step.run_id, claim_step.step_slug, claim_step.task_run_id,
            CASE status WHEN 'completed' THEN 'Cached' ELSE 'Running' END)
    ON CONFLICT (run_id, step_slug) DO UPDATE
    SET task_run_id = excluded.task_run_id, state_name = excluded.state_name, updated_at = clock_timestamp();
    RETURN NEXT;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.claim_step(uuid, text, int, uuid, text[], boolean) IS
    'pgflow.claim_step, and which task run claimed it.';


CREATE OR REPLACE FUNCTION pgflow_prefect.note_state(
    run_id uuid, step_slug text, task_run_id uuid, state_name text, message text DEFAULT NULL
) RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
#variable_conflict use_column
BEGIN
    UPDATE pgflow_prefect.task_runs t
    SET state_name = note_state.state_name, message = coalesce(note_state.message, t.message),
        updated_at = clock_timestamp()
    WHERE t.run_id = note_state.run_id AND t.step_slug = note_state.step_slug
      AND t.task_run_id = note_state.task_run_id; -- another flow run's task run has taken the step's place
END
$$;

COMMENT ON FUNCTION pgflow_prefect.note_state(uuid, text, uuid, text, text) IS
    'Notes the state that Prefect shows a step''s task run in, such as AwaitingRetry.';


CREATE OR REPLACE FUNCTION pgflow_prefect.complete_step(
    run_id uuid, step_slug text, step_result jsonb, epoch int, attempt int, task_run_id uuid
) RETURNS pgflow.step_states
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
DECLARE
    state pgflow.step_states := pgflow.complete_step(run_id, step_slug, step_result, epoch, attempt);
BEGIN
    IF state.status = 'completed' THEN
        PERFORM pgflow_prefect.note_state(run_id, step_slug, task_run_id, 'Completed');
    END IF;
    RETURN state;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.complete_step(uuid, text, jsonb, int, int, uuid) IS
    'pgflow.complete_step, and the state of the task run.';


CREATE OR REPLACE FUNCTION pgflow_prefect.fail_step(
    run_id uuid, step_slug text, error_message text, epoch int, attempt int, task_run_id uuid, state_name text
) RETURNS pgflow.step_states
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
DECLARE
    state pgflow.step_states := pgflow.fail_step(run_id, step_slug, error_message, epoch, attempt);
BEGIN
    IF state.status = 'failed' THEN
        PERFORM pgflow_prefect.note_state(run_id, step_slug, task_run_id, state_name, error_message);
    END IF;
    RETURN state;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.fail_step(uuid, text, text, int, int, uuid, text) IS
    'pgflow.fail_step, and the state of the task run.';


DO $rights$
DECLARE
    created regprocedure;
BEGIN
    FOR created IN
        SELECT oid FROM pg_catalog.pg_proc
        WHERE pronamespace = 'pgflow_prefect'::regnamespace AND proacl IS NULL AND proname IN (
            'adapter_version', 'take_run', 'claim_step', 'note_state', 'complete_step', 'fail_step')
    LOOP
        EXECUTE format('REVOKE EXECUTE ON FUNCTION %s FROM PUBLIC', created);
    END LOOP;
END
$rights$;

COMMIT;
