-- pgflow_api: the functions by which an application starts, cancels and reopens runs.
--
-- The engine's own functions run with their caller's rights. So a role that may call pgflow.run_workflow may also write
-- runs and step states by hand. Under row-level security, these functions raise an error instead of seeing half of the
-- rows. The functions here need less: INSERT on three columns of pgflow.runs, or on a request. PostgreSQL checks grants
-- and policies as for any INSERT. Then a trigger does the rest as the tables' owner. Only the triggers have the owner's
-- rights, and no role can call a trigger.
--
-- Needs pgflow.sql. Paste this file into an SQL editor as the owner of the schema pgflow, or psql -f api.sql.
-- One transaction, safe to run again. On Supabase, add pgflow_api (and, to read runs, pgflow) to the exposed schemas:
--
--     await supabase.schema('pgflow_api').rpc('run_workflow', { workflow_slug: 'greeting', payload: { id: 7 } })
--
-- To undo it, after row_level_security.sql: DROP TRIGGER begin_run ON pgflow.runs; DROP SCHEMA pgflow_api CASCADE;

BEGIN ISOLATION LEVEL READ COMMITTED; -- an older snapshot would not show what another session has just installed

SET LOCAL lock_timeout = '10s';
SET LOCAL statement_timeout = 0;
SET LOCAL client_min_messages = warning;
SET LOCAL pgflow.script_version = 6;

DO $guard$
BEGIN
    IF to_regprocedure('pgflow.is_under_policies()') IS NULL THEN
        RAISE EXCEPTION 'the schema pgflow is missing or old' USING HINT = 'Run pgflow.sql first.';
    END IF;
    IF NOT pg_has_role((SELECT relowner FROM pg_catalog.pg_class WHERE oid = 'pgflow.runs'::regclass), 'USAGE') THEN
        RAISE EXCEPTION '% does not own the tables of pgflow', current_user
            USING ERRCODE = 'insufficient_privilege', HINT = 'Run this as the role that ran pgflow.sql.';
    END IF;
    PERFORM pgflow.lock_schema('pgflow_api');
END
$guard$;

-- The requests for runs, each with the role that made it. No role may write id, requested_by or requested_at.
CREATE TABLE IF NOT EXISTS pgflow_api.requests (
    id BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    run_id UUID NOT NULL REFERENCES pgflow.runs (id) ON DELETE CASCADE,
    action TEXT NOT NULL CHECK (action IN ('cancel', 'reopen')),
    reason TEXT,
    requested_by TEXT NOT NULL DEFAULT current_user,
    requested_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp()
);

DO $indexes$
BEGIN
    IF to_regclass('pgflow_api.requests_by_run') IS NULL THEN
        CREATE INDEX requests_by_run ON pgflow_api.requests (run_id);
    END IF;
END
$indexes$;


------------------------------------------------------------------------------------------------------------
-- The triggers: with the owner's rights, after the caller's have been checked
------------------------------------------------------------------------------------------------------------

-- The function sets search_path although it writes runs and step_states. Your triggers on these tables run inside it with
-- the owner's rights, and the caller's search_path must not decide what their unqualified names mean.
CREATE OR REPLACE FUNCTION pgflow_api.begin_run() RETURNS trigger
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    definition pgflow.definitions;
    run pgflow.runs;
BEGIN
    IF TG_RELID <> 'pgflow.runs'::regclass THEN -- with the owner's rights, on another role's table
        RAISE EXCEPTION 'the trigger function pgflow_api.begin_run is for pgflow.runs, not for %', TG_RELID::regclass
            USING ERRCODE = 'insufficient_privilege';
    END IF;
    IF pgflow.is_under_policies() THEN
        PERFORM pgflow.refuse_policies();
    END IF;
    definition := pgflow.find_definition(NEW.workflow_slug);
    UPDATE pgflow.runs r SET definition_id = definition.id, remaining = definition.step_count
    WHERE r.id = NEW.id
    RETURNING r.* INTO run;
    run := pgflow.recompute_run(run);
    PERFORM pgflow.announce_run(run);
    RETURN NULL;
END
$$;

COMMENT ON FUNCTION pgflow_api.begin_run() IS
    'Starts the root steps of a run that was inserted as a plain row, and tells workers of it.';


CREATE OR REPLACE FUNCTION pgflow_api.do_request() RETURNS trigger
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF TG_RELID <> 'pgflow_api.requests'::regclass THEN -- with the owner's rights, on another role's table
        RAISE EXCEPTION 'the trigger function pgflow_api.do_request is for pgflow_api.requests, not for %', TG_RELID::regclass
            USING ERRCODE = 'insufficient_privilege';
    END IF;
    IF NEW.action = 'cancel' THEN
        PERFORM pgflow.cancel_run(NEW.run_id, NEW.reason);
    ELSE
        PERFORM pgflow.reopen_run(NEW.run_id);
    END IF;
    RETURN NULL;
END
$$;

COMMENT ON FUNCTION pgflow_api.do_request() IS 'Does what a row of pgflow_api.requests asks for.';


CREATE OR REPLACE FUNCTION pgflow_api.shorten_reason() RETURNS trigger
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    NEW.reason := left(NEW.reason, 10000) || ' ...';
    RETURN NEW;
END
$$;

COMMENT ON FUNCTION pgflow_api.shorten_reason() IS
    'Keeps as much of a reason as a person needs to read.';


DO $triggers$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_trigger
                   WHERE tgrelid = 'pgflow_api.requests'::regclass AND tgname = 'shorten_reason') THEN
        CREATE TRIGGER shorten_reason BEFORE INSERT ON pgflow_api.requests FOR EACH ROW
            WHEN (length(NEW.reason) > 10100) EXECUTE FUNCTION pgflow_api.shorten_reason();
    END IF;
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_trigger
                   WHERE tgrelid = 'pgflow.runs'::regclass AND tgname = 'begin_run') THEN
        -- The engine inserts its runs with a definition: for those, this trigger costs one comparison.
        CREATE TRIGGER begin_run AFTER INSERT ON pgflow.runs FOR EACH ROW
            WHEN (NEW.definition_id IS NULL AND NEW.status = 'pending') EXECUTE FUNCTION pgflow_api.begin_run();
    END IF;
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_trigger
                   WHERE tgrelid = 'pgflow_api.requests'::regclass AND tgname = 'do_request') THEN
        -- AFTER: a policy's WITH CHECK comes before it.
        CREATE TRIGGER do_request AFTER INSERT ON pgflow_api.requests FOR EACH ROW
            EXECUTE FUNCTION pgflow_api.do_request();
    END IF;
END
$triggers$;


------------------------------------------------------------------------------------------------------------
-- What applications call. All with the caller's rights, and row_security as it is: a run that a policy hides
-- from the caller is an unknown run.
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow_api.run_workflow(
    workflow_slug text, payload jsonb, run_id uuid DEFAULT gen_random_uuid()
) RETURNS pgflow.runs
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    wanted uuid := coalesce(run_id, gen_random_uuid());
    run pgflow.runs;
BEGIN
    IF payload IS NULL THEN
        RAISE EXCEPTION 'the payload of a run of workflow "%" is NULL', workflow_slug
            USING ERRCODE = 'invalid_parameter_value', HINT = 'Give a JSON value, ''{}'' for none.';
    END IF;
    IF NOT EXISTS (SELECT FROM pgflow.workflows w WHERE w.slug = run_workflow.workflow_slug) THEN
        RAISE EXCEPTION 'unknown workflow "%"', coalesce(workflow_slug, 'NULL') USING ERRCODE = 'no_data_found';
    END IF;
    INSERT INTO pgflow.runs (workflow_slug, id, payload)
    VALUES (run_workflow.workflow_slug, wanted, run_workflow.payload)
    ON CONFLICT (id) DO NOTHING;
    SELECT * INTO run FROM pgflow.runs r WHERE r.id = wanted;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'run % exists already, and is not yours', wanted USING ERRCODE = 'insufficient_privilege';
    ELSIF run.workflow_slug <> run_workflow.workflow_slug THEN
        RAISE EXCEPTION 'run % exists already, of workflow "%"', run.id, run.workflow_slug
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    RETURN run;
END
$$;

COMMENT ON FUNCTION pgflow_api.run_workflow(text, jsonb, uuid) IS
    'Starts a run and its root steps; the same run_id again returns the caller''s run that exists.';


CREATE OR REPLACE FUNCTION pgflow_api.request(run_id uuid, action text, reason text) RETURNS pgflow.runs
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    run pgflow.runs;
BEGIN
    IF NOT EXISTS (SELECT FROM pgflow.runs r WHERE r.id = request.run_id) THEN
        RAISE EXCEPTION 'unknown run %', coalesce(run_id::text, 'NULL') USING ERRCODE = 'no_data_found';
    END IF;
    INSERT INTO pgflow_api.requests (run_id, action, reason)
    VALUES (request.run_id, request.action, request.reason);
    SELECT * INTO run FROM pgflow.runs r WHERE r.id = request.run_id;
    RETURN run;
END
$$;

COMMENT ON FUNCTION pgflow_api.request(uuid, text, text) IS
    'Makes a request for a run, and returns the run afterwards. Internal.';


CREATE OR REPLACE FUNCTION pgflow_api.cancel_run(run_id uuid, reason text DEFAULT 'cancelled') RETURNS pgflow.runs
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$ SELECT pgflow_api.request(run_id, 'cancel', reason) $$;

COMMENT ON FUNCTION pgflow_api.cancel_run(uuid, text) IS
    'pgflow.cancel_run for a run that the caller sees. A finished run stays as it is.';


CREATE OR REPLACE FUNCTION pgflow_api.reopen_run(run_id uuid) RETURNS pgflow.runs
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$ SELECT pgflow_api.request(run_id, 'reopen', NULL) $$;

COMMENT ON FUNCTION pgflow_api.reopen_run(uuid) IS 'pgflow.reopen_run for a run that the caller sees.';


DO $rights$
BEGIN
    PERFORM pgflow.close_schema('pgflow_api');
END
$rights$;

COMMIT;
